"""Signs that an answer that was judged right was not come by in the right way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

from rewards._numbers import as_number

NUM = r"-?\$?\d[\d,]*(?:\.\d+)?"
TIMES, OVER = "*x\u00d7", "/\u00f7"
SIGN = rf"[-+{TIMES}{OVER}]"
EQUATION = re.compile(rf"(?<![\w.,*/+=-])\s*({NUM}(?:\s*{SIGN}\s*{NUM})+)\s*=\s*({NUM})(?![\d.]*\s*(?:{SIGN}|%))")
"""Products, quotients, sums and differences of plain numbers, and what they are said to be."""
CLAIM = re.compile(rf"(?:####|\\boxed\{{|answer is:?)\s*({NUM})(?![\d.,]*\s*(?:{SIGN}|=))", re.IGNORECASE)
ROUNDED = Decimal("0.01")
"""Of what a result may be off where it was rounded."""


def flags_of(answer: Mapping[str, Any]) -> list[str]:
    """What is suspicious about an answer as `answers.jsonl` has it: all of it."""
    found = [
        f"format: {name} is {part:g}"
        for name, part in list(answer["parts"].items())[1:]
        if part is not None and part < 1.0
    ]
    if answer["finish"] == "length":
        found.append("truncated")
    found += [f"contradiction: {wrong}" for wrong in false_equations(answer["text"])[:3]]
    claims = list(dict.fromkeys(str(as_number(claim)) for claim in CLAIM.findall(answer["text"])))
    if len(claims) > 1:
        found.append(f"several answers: {', '.join(claims[:4])}")
    return found


def false_equations(text: str) -> list[str]:
    """Equations of plain numbers that do not hold, also where the result is taken as rounded.

    >>> false_equations("3 * 4 = 12, 12 / 5 = 2.4, 7 / 3 = 2.33, and so 5 + 8 x 2 = 26.")
    ['5 + 8 x 2 = 26']
    """
    wrong = []
    for left, right in EQUATION.findall(text):
        value, said = value_of(left), as_number(right)
        if value is None or said is None:
            continue
        if abs(value - said) > max(ROUNDED * abs(value), ROUNDED):
            wrong.append(f"{' '.join(left.split())} = {right}")
    return wrong


def value_of(text: str) -> Decimal | None:
    """The value of a chain of operations, products before sums; None where it has none.

    >>> value_of("2 + 3 x 4 - 6 / 3")
    Decimal('12')
    """
    tokens = re.findall(rf"(?<=[\d.])\s*({SIGN})|({NUM})", text)
    numbers = [as_number(number) for _, number in tokens if number]
    signs = [sign for sign, _ in tokens if sign]
    if any(number is None for number in numbers) or len(signs) != len(numbers) - 1:
        return None
    total, term = Decimal(0), numbers[0] or Decimal(0)
    try:
        for sign, number in zip(signs, numbers[1:], strict=True):
            assert number is not None
            if sign in TIMES:
                term *= number
            elif sign in OVER:
                term /= number
            else:
                total, term = total + term, number if sign == "+" else -number
    except (InvalidOperation, DivisionByZero):
        return None
    return total + term
