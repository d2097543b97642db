"""The description of a cluster from what runs measured: lengths, rates of generation and training, seconds of sync."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from rlpost.errors import RunError
from rlpost.history import History, lines_of, read_history
from rlpost.plan import DECODE_STEP_S, TOKEN_S

NEEDED = ("time/step_s", "time/generate_s", "time/train_s", "rollouts/num", "rollouts/length_max", "tokens/generated")
TRAINING = ("time/train_s", "time/score_s", "time/batch_s")
SPREAD = 1.5
"""Decode steps a token must differ by so much between steps of runs, or the two costs cannot be told apart."""
_SHARES = 201
"""Quantiles that are kept of lengths that are all known."""


def described(folders: Sequence[Path], rates_of: Sequence[Path] = ()) -> dict[str, Any]:
    """A tree for `cluster.load`, of the first run.

    What decoding costs is from every run that is synchronous, as a pipeline hides it. With `rates_of` it is from those
    runs alone, and so is what training costs, so that the first run's seconds are predicted and not looked at; its
    lengths, the share of tokens that it trains and its seconds of sync are its own.
    """
    first, *others = (read_history(folder) for folder in folders)
    measured = [read_history(folder) for folder in rates_of]
    known = [history for history in measured or [first, *others] if shows_decoding(history)]
    if not known:
        raise RunError(
            f"{first.folder} must be a run with generator.max_staleness=0 and whole answers, or stand beside one: "
            "otherwise the time of generation is hidden; give such a run as well"
        )
    recipe, replicas = first.recipe, num_replicas(first)
    remote = kind_of(recipe) == "remote_vllm"
    servers = section(section(recipe, "generator"), "servers")
    size = int(servers.get("tensor_parallel") or 1) if remote else 1
    apart = replicas * size if remote else 0
    return {
        "gpus": num_ranks(first) + apart,
        "placement": "separate" if remote else "colocated",
        "generator_gpus": apart or None,
        "steps": max(10, len(first.steps)),
        "prompts_per_step": int(recipe.get("prompts_per_step", 32)),
        "group_size": int(section(recipe, "sampling").get("group_size", 8)),
        **pipeline_of(recipe),
        "replicas": {"tensor_parallel": size, "max_num_seqs": slots_of(recipe), **generation_of(known)},
        "lengths": lengths_of(first),
        "train": training_of(measured[0] if measured else first) | {"kept_frac": kept_of(first)},
        "sync": {"seconds": mean(row.get("time/sync_s", 0.0) for row in measured_steps(first))},
    }


def generation_of(histories: Sequence[History]) -> dict[str, float]:
    """The rates of section `replicas`.

    A token that is read is taken to cost no more than one that is decoded: how much less is not logged. Nor is what
    the cache holds; the answers of the runs did fit.
    """
    step_s, sequence_s = fit_decode([point for history in histories for point in decode_points(history)])
    prefill_rate = 1 / max(sequence_s, 1e-9)
    return {"step_s": step_s, "sequence_s": sequence_s, "prefill_rate": prefill_rate, "cache_tokens": 1e15}


def section(tree: Any, name: str) -> dict[str, Any]:
    """A section of a recipe, empty where it is not there.

    >>> section({"generator": None}, "generator")
    {}
    """
    found = tree.get(name) if isinstance(tree, dict) else None
    return found if isinstance(found, dict) else {}


def kind_of(recipe: dict[str, Any]) -> str:
    """The generator's kind."""
    return str(section(recipe, "generator").get("kind") or "local_vllm")


def staleness_of(recipe: dict[str, Any]) -> int:
    """k of a recipe, which may be from before there was one."""
    return int(section(recipe, "generator").get("max_staleness") or 0)


def shows_decoding(history: History) -> bool:
    """Whether each step of a run generates its own answers, whole, while everything else waits."""
    return not staleness_of(history.recipe) and section(history.recipe, "generator").get("partial_tokens") is None


def pipeline_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of its pipeline.

    >>> pipeline_of({"generator": {"max_staleness": 2, "first_come": True}})
    {'max_staleness': 2, 'ahead': 1, 'first_come': True, 'partial_tokens': None, 'in_flight': 'recompute'}
    """
    generator, k = section(recipe, "generator"), staleness_of(recipe)
    first_come = bool(generator.get("first_come")) and k > 0
    in_flight = section(generator, "servers").get("in_flight")
    return {
        "max_staleness": k,
        "ahead": max(1, k // 2) if first_come else None,  # as `pipeline.py` of rlpost: the rest is for overtaking
        "first_come": first_come,
        "partial_tokens": None if k else generator.get("partial_tokens"),
        "in_flight": in_flight if in_flight in ("keep", "wait") else "recompute",
    }


def slots_of(recipe: dict[str, Any]) -> int:
    """Answers that a replica of a recipe decodes at once."""
    return int(section(recipe, "generator").get("max_num_seqs") or 256)


def num_ranks(history: History) -> int:
    """Ranks of a run: seconds x ranks of its account over the seconds of its clock."""
    steps = history.steps
    spent = sum(row["time/train_s"] for row in steps)
    counted = steps[-1].get("total/device_s/train", 0.0) if steps else 0.0
    return max(1, round(counted / spent)) if spent else 1


def num_replicas(history: History) -> int:
    """Generators of a run: its servers, or its ranks."""
    if kind_of(history.recipe) != "remote_vllm":
        return num_ranks(history)
    servers = section(section(history.recipe, "generator"), "servers")
    return max(1, len(servers.get("urls") or ()) or int(servers.get("replicas") or 1))


def measured_steps(history: History) -> list[dict[str, Any]]:
    """The lines of steps that trained, but for the first, which warms up."""
    steps = [row for row in history.steps if all(key in row for key in NEEDED) and row["rollouts/num"]][1:]
    if not steps:
        raise RunError(f"{history.folder} must hold two steps or more that generated and trained (it holds fewer)")
    return steps


def decode_points(history: History) -> list[tuple[float, float, float]]:
    """Of each step and replica: decode steps, tokens, seconds.

    Where all answers fit at once there are as many steps as the longest has tokens; otherwise slots are full until the
    last answers end, which are taken to be half as long as the longest.
    """
    replicas, slots = num_replicas(history), slots_of(history.recipe)
    found = []
    for row in measured_steps(history):
        share, longest = row["tokens/generated"] / replicas, row["rollouts/length_max"]
        fits = row["rollouts/num"] <= slots * replicas
        found.append((longest if fits else share / slots + longest / 2, share, row["time/generate_s"]))
    return found


def fit_decode(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of a decode step and of each answer in it: steps x a + tokens x c = seconds.

    Where all points have about as many tokens a step, or noise makes a cost negative, only the sum is known: then a
    and c are as `rlpost check --plan` has them, 75 to 1, times one factor.

    >>> fit_decode([(100.0, 1000.0, 3.0), (100.0, 4000.0, 9.0), (300.0, 1000.0, 5.0)])
    (0.01, 0.002)
    """
    width = [num / steps for steps, num, _ in points]
    if max(width) >= SPREAD * min(width):
        rows = np.array(points)
        found, *_ = np.linalg.lstsq(rows[:, :2], rows[:, 2], rcond=None)
        if min(found) >= 0:  # else noise decides
            return round(float(found[0]), 9), round(float(found[1]), 9)
    whole = sum(steps * DECODE_STEP_S + num * TOKEN_S for steps, num, _ in points)
    factor = sum(seconds for *_, seconds in points) / whole
    return factor * DECODE_STEP_S, factor * TOKEN_S


def training_of(history: History) -> dict[str, Any]:
    """Rate and fixed seconds: means over the steps, as simulated steps are to add up to the time that the run took."""
    steps, ranks = measured_steps(history), num_ranks(history)
    generated = sum(row["tokens/generated"] for row in steps)
    processed = kept_of(history) * (generated + prompt_of(history) * sum(row["rollouts/num"] for row in steps))
    spent = sum(row.get(name, 0.0) for row in steps for name in TRAINING)
    known = sum(row["time/generate_s"] + row.get("time/sync_s", 0.0) for row in steps)
    left = sum(row["time/step_s"] for row in steps) - spent - known
    return {"rate": processed / (spent * ranks), "fixed_s": max(0.0, left / len(steps))}


def kept_of(history: History) -> float:
    """Share of a run's tokens that are trained."""
    steps, epochs = measured_steps(history), int(section(history.recipe, "algorithm").get("epochs") or 1)
    generated = sum(row["tokens/generated"] for row in steps)
    trained = sum(row.get("tokens/trained", row["tokens/generated"]) for row in steps)
    return min(1.0, max(1e-6, trained / (epochs * generated)))


def prompt_of(history: History) -> int:
    """Tokens of a mean prompt."""
    steps = measured_steps(history)
    prompts = sum(row.get("groups/num", 0) for row in steps)
    return round(sum(row.get("tokens/prompt", 0) for row in steps) / prompts) if prompts else 0


def lengths_of(history: History) -> dict[str, Any]:
    """Section `lengths`: of every rollout where `samples.jsonl` has all of them, else of the steps' quantiles."""
    steps = measured_steps(history)
    limit = int(section(history.recipe, "sampling").get("max_new_tokens") or 1024)
    found: dict[str, Any] = {"kind": "quantiles", "prompt": prompt_of(history), "max_new_tokens": limit}
    samples = [row for row in lines_of(history.folder / "samples.jsonl") if row.get("role", "policy") == "policy"]
    if samples and len(samples) >= sum(row["rollouts/num"] for row in history.steps if "rollouts/num" in row):
        lengths = [row["num_tokens"] for row in samples]
        share = np.linspace(0, 1, _SHARES)
        pairs = list(zip(share.tolist(), np.quantile(lengths, share).tolist(), strict=True))
        return found | {"quantiles": [[x, max(1.0, y)] for x, y in pairs], "alike": likeness(samples)}
    return found | {"quantiles": quantiles_of(steps)}


def quantiles_of(steps: Sequence[dict[str, Any]]) -> list[list[float]]:
    """[share, tokens] from the medians of the steps' quantiles; a step's longest stands at 1 - 1 / rollouts."""
    named = {0.1: "rollouts/length_p10", 0.5: "rollouts/length_p50", 0.9: "rollouts/length_p90"}
    named[0.99] = "rollouts/length_p99"
    longest = [row["rollouts/length_max"] for row in steps]
    known = {
        share: median(row[name] for row in steps) for share, name in named.items() if all(name in row for row in steps)
    }
    last = 1 - 1 / mean(row["rollouts/num"] for row in steps)
    if last > max(known, default=0.0):
        known[last] = median(longest)
    pairs = [[0.0, max(1.0, 0.5 * min([*known.values(), *longest]))], *([x, y] for x, y in known.items())]
    pairs.append([1.0, max(longest)])
    rising = np.maximum.accumulate([y for _, y in pairs]).tolist()
    return [[x, max(1.0, y)] for (x, _), y in zip(pairs, rising, strict=True)]


def likeness(samples: Sequence[dict[str, Any]]) -> float:
    """Correlation of the logarithms of two lengths of one group: 1 - variance inside groups / variance of all."""
    groups: dict[tuple[int, int], list[float]] = {}
    for row in samples:
        groups.setdefault((row["step"], row["group"]), []).append(math.log(max(1, row["num_tokens"])))
    many = [values for values in groups.values() if len(values) > 1]
    every = [value for values in many for value in values]
    if not every or np.var(every) == 0:
        return 0.0
    inside = mean(float(np.var(values, ddof=1)) for values in many)
    return round(min(1.0, max(0.0, 1 - inside / float(np.var(every)))), 3)
