"""Expressions compared by `math_verify`, which reads LaTeX with sympy; it takes a second to load."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig
from sympy import Expr, Float, Rational

DIGITS = 12
"""To which decimals that stand for something else must agree: `1.4142` is not the root of 2."""
EXACT_DIGITS = 40
"""To which numbers agree that are taken for equal without a proof."""
POINTS = (Rational(137, 211), Rational(-59, 83), Rational(1117, 307))
"""Where expressions with a variable are tried before a proof is looked for."""
_WAYS = [LatexExtractionConfig(), ExprExtractionConfig()]
for _name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # each call would say that the caller keeps the time


@lru_cache(maxsize=4096)
def same_expression(a: str, b: str) -> bool:
    """Whether two expressions are equal, in whatever order they are given."""
    one, other = _read(a), _read(b)
    if not one or not other:
        return False
    if len(one) == len(other) == 1 and isinstance(one[0], Expr) and isinstance(other[0], Expr):
        by_value = _same_value(one[0], other[0])
        if by_value is not None:
            return by_value
    how: dict[str, Any] = {"float_rounding": DIGITS, "timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(verify(one, other, **how)) and bool(verify(other, one, **how))


def _same_value(a: Expr, b: Expr) -> bool | None:
    """By their values: of numbers, or at a few points, where one difference is enough; None: not decided."""
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    digits = DIGITS if a.has(Float) or b.has(Float) else EXACT_DIGITS
    for shift in range(1 if not names else 2):
        point = {name: POINTS[(i + shift) % len(POINTS)] + i for i, name in enumerate(names)}
        x, y = (one.subs(point).evalf(digits + 10) for one in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            return None
        if abs(x - y) > (1 + abs(x)) * Rational(1, 10**digits):
            return False
    return None if names else True


@lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    found = parse(f"${text}$", extraction_config=_WAYS, parsing_timeout=None)
    return [one for one in found if not isinstance(one, str)]
