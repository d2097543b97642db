"""A recipe file and its `key=value` overrides as a plain tree, before any key is compared with the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlpost.errors import RecipeError

PLAIN = (
    ("tasks", "train", "path"),
    ("tasks", "eval", "path"),
    ("sft", "tasks", "path"),
    ("algorithm", "advantage", "use"),
    ("algorithm", "loss", "use"),
    ("algorithm", "length", "use"),
)
"""(section, name, key): what may be plain text, and the key that it stands for."""


def parse(path: Path) -> dict[str, Any]:
    """The file's keys and values, interpolations resolved."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise RecipeError([f"the recipe {path} cannot be read ({error.strerror}): check its path"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError([f"{path}, line {line}: must be YAML ({error.problem})"]) from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError([f"{path} must be YAML ({str(error).splitlines()[0]})"]) from None
    if not isinstance(tree, dict):
        raise RecipeError([f"{path} must hold keys and values, as in `steps: 100` (got {type(tree).__name__})"])
    return {str(key): value for key, value in tree.items()}


def expand(tree: dict[str, Any]) -> dict[str, Any]:
    """What is given as plain text is the first field of its section: a task source its path, a choice its name.

    >>> expand({"tasks": {"train": "a.jsonl"}, "algorithm": {"loss": "cispo"}})
    {'tasks': {'train': {'path': 'a.jsonl'}}, 'algorithm': {'loss': {'use': 'cispo'}}}
    """
    for section, name, key in PLAIN:
        fields = tree.get(section)
        if isinstance(fields, dict) and isinstance(fields.get(name), str):
            fields[name] = {key: fields[name]}
    return tree


def override(tree: dict[str, Any], text: str) -> list[str]:
    """Set one `key.key=value` in the tree, where a number is a place in a list; returns what is wrong with it.

    >>> tree = {"rewards": [{"use": "final_number"}]}
    >>> override(tree, "rewards.0.weight=2"), tree
    ([], {'rewards': [{'use': 'final_number', 'weight': 2}]})
    """
    key, equals, _ = text.partition("=")
    if not equals or not key:
        return [f"`{text}` must be key=value, as in `engine.lr=1e-6`"]
    try:
        value = OmegaConf.from_dotlist([f"value{text[len(key) :]}"])
        plain: Any = OmegaConf.to_container(value, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException):
        return [f"{key}: the value in `{text}` must be YAML (quote it for the shell)"]
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part)
    if isinstance(node, dict):
        node[last] = plain["value"]
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = plain["value"]
    else:
        return [f"{key}: `{text}` sets a part of something that is not there or has no parts"]
    expand(tree)
    return []


def _child(node: Any, part: str) -> Any:
    """What `part` names; a section that is absent or null is made."""
    if isinstance(node, list):
        return node[int(part)] if part.isdigit() and int(part) < len(node) else None
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    return None
