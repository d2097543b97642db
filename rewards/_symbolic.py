"""Expressions compared by `math_verify`, which reads LaTeX with sympy; it takes a second to load."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

DIGITS = 12
"""To which decimals that stand for something else must agree: `1.4142` is not the root of 2."""
_WAYS = [LatexExtractionConfig(), ExprExtractionConfig()]
for _name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # each call would say that the caller keeps the time


def same_expression(a: str, b: str) -> bool:
    """Whether two expressions are equal, in whatever order they are given."""
    one, other = _read(a), _read(b)
    if not one or not other:
        return False
    how: dict[str, Any] = {"float_rounding": DIGITS, "timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(verify(one, other, **how)) and bool(verify(other, one, **how))


@lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    found = parse(f"${text}$", extraction_config=_WAYS, parsing_timeout=None)
    return [one for one in found if not isinstance(one, str)]
