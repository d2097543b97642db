"""No secret may stand in a recipe: it is printed, saved with the run, and sent to W&B."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rlpost.errors import SECRET
from rlpost.recipe import Recipe

NAME = re.compile(r"(^|_)(api_?key|access_key|secret|secret_key|password|passwd|(hf|auth|access)_token)$", re.I)


def secret_problems(recipe: Recipe) -> list[str]:
    """Each text that looks like a secret, by its key or by its shape; the text itself is not repeated."""
    return [
        f"{key} must not hold a secret, which would be printed and saved with the run: let the plug-in read it from "
        "the environment"
        for key, text in _texts(asdict(recipe), "")
        if SECRET.search(text) or (NAME.search(key.rpartition(".")[2]) and text)
    ]


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, f"{where}.{key}" if where else str(key))
