"""What differs between the recipe of a checkpoint and the one that goes on from it, and whether that is meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rlpost.errors import RunError
from rlpost.recipe import Recipe

OF_THE_START = ("name", "run_dir", "resume", "resume_changed")
"""Keys that say where a run is and how it starts: not worth a word."""
HARMLESS = (
    *("save_", "keep_", "logging.", "evaluation.", "batch.", "preempt.", "failure.", "watchdog."),
    *("generator.memory_frac", "generator.kv_cache_gib", "generator.max_num_seqs", "generator.sleep_level"),
    *("generator.enforce_eager", "generator.canary_tolerance", "engine.zero_stage", "engine.offload_", "engine.park"),
    *("generator.servers.", "engine.sequence_parallel", "engine.sync_bucket_mib", "model.gradient_checkpointing"),
    *("model.offload_activations", "model.logp_chunk", "model.attention"),
)
"""Beginnings of keys that decide on files, speed and memory, and on the numbers up to their rounding at most."""
GONE = "(not there)"


def check_changes(saved: Mapping[str, Any], recipe: Recipe) -> str | None:
    """What is different, to be told; raises where that changes the run and `resume_changed` does not allow it."""
    found = differences(saved, recipe)
    if not found:
        return None
    lines = [f"  {key}: {before!r} -> {after!r}" for key, (before, after) in found.items()]
    harmful = [key for key in found if not is_harmless(key, recipe)]
    if harmful and not recipe.resume_changed:
        raise RunError(
            "resume: the recipe must be that of the checkpoint, or the run is another from here on (got another "
            f"{', '.join(harmful)}): put it back, or go on with resume_changed=true\n" + "\n".join(lines)
        )
    kind = "in what changes the run from here on" if harmful else "only in files, speed or memory"
    return f"resume: the recipe differs from that of the checkpoint {kind}:\n" + "\n".join(lines)


def differences(saved: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key -> (value of the checkpoint, value now); a field that the checkpoint does not know had its default."""
    defaults = dict(flat(asdict(Recipe())))
    before, after = dict(flat(saved)), dict(flat(asdict(recipe)))
    every = {key: (before.get(key, defaults.get(key, GONE)), after.get(key, GONE)) for key in [*before, *after]}
    return {key: pair for key, pair in every.items() if pair[0] != pair[1] and key not in OF_THE_START}


def is_harmless(key: str, recipe: Recipe) -> bool:
    """Whether another value leaves the numbers of the run as they are.

    >>> is_harmless("engine.lr", Recipe()), is_harmless("engine.zero_stage", Recipe()), is_harmless("steps", Recipe())
    (False, True, True)
    """
    if key == "steps":  # other schedules are cut to the run's length
        return recipe.engine.schedule == "constant"
    if key == "evaluation.every" and recipe.algorithm.kl.reset.patience:
        return False
    if key.startswith("synth"):  # without rounds in the run it is another command's
        return recipe.synth is None or recipe.synth.online is None
    return key.startswith(HARMLESS)


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists by their dotted keys.

    >>> dict(flat({"a": {"b": 1}, "c": [2, {"d": 3}], "e": []}))
    {'a.b': 1, 'c.0': 2, 'c.1.d': 3, 'e': []}
    """
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found = False
    for key, value in items:
        found = True
        yield from flat(value, f"{prefix}{key}.")
    if not found:
        yield prefix[:-1], tree
