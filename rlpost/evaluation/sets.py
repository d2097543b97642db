"""What `rlpost eval` is asked for: data sets by name, by file, or of a recipe, each as a whole recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from rlpost.check import checked
from rlpost.errors import RecipeError
from rlpost.plugins import did_you_mean, make_importable
from rlpost.recipe import Recipe, read_tree
from rlpost.yaml_tree import expand, parse

MARKED = {"suffix": "\nReason step by step, and end with `#### ` and the number."}
BOXED = {"suffix": "\n\nReason step by step, and put your final answer within \\boxed{}."}
SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "tasks": {
            "eval": {"path": "hf:openai/gsm8k:main:test", "prompt": "question", "answer_regex": "#### (.+)"},
            "prompting": MARKED,
        },
        "rewards": [{"use": "final_number"}, {"use": "marked_answer", "weight": 0.0}],
        "sampling": {"max_new_tokens": 1024},
    },
    "svamp": {
        "tasks": {
            "eval": {
                "path": "hf:ChilleD/SVAMP:test",
                "prompt": "{Body} {Question}",
                "answer": "Answer",
                "duplicates": "drop",
            },
            "prompting": MARKED,
        },
        "rewards": [{"use": "final_number"}, {"use": "marked_answer", "weight": 0.0}],
        "sampling": {"max_new_tokens": 1024},
    },
    "math500": {
        "tasks": {
            "eval": {"path": "hf:HuggingFaceH4/MATH-500:test", "prompt": "problem", "extra": ["level"]},
            "prompting": BOXED,
        },
        "rewards": [{"use": "boxed_answer"}],
        "sampling": {"max_new_tokens": 2048},
        "evaluation": {"by": "level"},
    },
}
"""Name -> the parts of a recipe that say what is asked and how it is judged. The first reward decides what is correct;
others are shown beside it and are what an audit looks at."""
PARTS = ("tasks", "rewards", "rollout", "sampling", "evaluation")


def is_recipe(target: str) -> bool:
    """Whether `rlpost eval` was given a recipe, and not a model."""
    return target.endswith((".yaml", ".yml"))


def recipes_of(
    target: str,
    sets: Sequence[str],
    overrides: Sequence[str],
    *,
    asked: Mapping[str, Any],
    limit: int | None = None,
    world_size: int = 1,
) -> list[tuple[str, Recipe]]:
    """A name and a checked recipe of each data set; `asked` are fields of `evaluation` from the command line."""
    if not sets and not is_recipe(target):
        raise RecipeError([f"--tasks must name what to ask the model {target} (none is named): {_known()}"])
    base = _base(target, world_size)
    found: dict[str, Recipe] = {}
    for spec in sets or [""]:
        name, parts = _parts(spec, base, target)
        tree = _merged(base, parts)
        tree["evaluation"] = {**(tree.get("evaluation") or {}), **asked}
        source = tree["tasks"].get("eval")
        if isinstance(source, dict):
            if limit is not None:
                source["limit"] = limit
            tree["tasks"].setdefault("train", deepcopy(source))  # nothing is trained; a recipe must have it
        if name in found:
            raise RecipeError([f"--tasks must name each data set once ({name} is there twice)"])
        found[name] = checked(*read_tree(tree, overrides, name=name), world_size)
        if found[name].tasks.eval is None:
            raise RecipeError(["tasks.eval must name the held-out problems (the recipe has none): add tasks.eval.path"])
    return list(found.items())


def _base(target: str, world_size: int) -> dict[str, Any]:
    if is_recipe(target):
        make_importable(Path(target).parent)
        return expand(parse(Path(target)))
    return {
        "model": {"path": target},
        "generator": {"seeding": "request", "memory_frac": 0.9},
        "tasks": {},
        "prompts_per_step": world_size,
    }


def _parts(spec: str, base: Mapping[str, Any], target: str) -> tuple[str, dict[str, Any]]:
    """The name of a data set, and what it says: `gsm8k`, `gsm8k=FILE`, a YAML file, a data file with a recipe."""
    if not spec:
        return Path(target).stem, {}
    name, _, path = spec.partition("=")
    if name in SETS:
        parts = deepcopy(SETS[name])
        if path:
            parts["tasks"]["eval"]["path"] = path
        return name, parts
    if path:
        raise RecipeError([f"--tasks {spec}: `{name}` is no data set{did_you_mean(name, SETS)}; {_known()}"])
    if is_recipe(spec):
        make_importable(Path(spec).parent)
        tree = expand(parse(Path(spec)))
        tasks = {key: value for key, value in (tree.get("tasks") or {}).items() if key != "train"}
        return Path(spec).stem, {key: tree[key] for key in PARTS if key in tree} | {"tasks": tasks}
    if "eval" in (base["tasks"] or {}) and Path(spec).suffix in (".jsonl", ".parquet"):
        return Path(spec).stem, {"tasks": {"eval": {"path": spec}}}
    raise RecipeError([f"--tasks {spec}: no such data set{did_you_mean(spec, SETS)}; {_known()}"])


def _known() -> str:
    return (
        f"it is one of {', '.join(SETS)}, one of these with a file of yours, as in gsm8k=test.jsonl, or a YAML file "
        "with the sections `tasks` (`eval`, `prompting`) and `rewards` of a recipe"
    )


def _merged(base: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """`parts` over `base`: mappings key by key, anything else as a whole."""
    tree = deepcopy(dict(base))
    for key, value in parts.items():
        inside = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = _merged(tree[key], value) if inside else deepcopy(value)
    return tree
