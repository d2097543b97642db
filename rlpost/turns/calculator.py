"""Answers with a calculator: `<calc>12*7</calc>` is followed by `<result>84</result>`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

from rlpost.talk import Talk

LONGEST = 200
"""Characters of an expression."""
LARGEST = 10**60
"""Of every value on the way, and of numerators and denominators."""
HIGHEST = 64
"""Largest exponent."""
DIGITS = 12
"""Of a result that is no whole number."""
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


async def calculator(
    talk: Talk,
    *,
    begin: str = "<calc>",
    end: str = "</calc>",
    result: str = "<result>{}</result>",
    error: str = "error",
    max_calls: int = 4,
) -> None:
    """What the policy writes between `begin` and `end` is calculated, and what comes out put behind it, as in `result`.

    Where it is no arithmetic, `error` stands in its place. After `max_calls` the policy writes on without.
    """
    for _ in range(max_calls):
        turn = await talk.generate(stop=end)
        if turn.stop is None:
            return
        _, begun, asked = turn.text.partition(end)[0].rpartition(begin)
        try:
            value = calculate(asked if begun else "")
        except ValueError:
            talk.append(result.format(error), error=True)
        else:
            talk.append(result.format(value))
    await talk.generate()


def calculate(text: str) -> str:
    """The value of an arithmetic expression: numbers, + - * / // % **, and parentheses; ValueError for anything else.

    Exact: fractions are kept to the end, where one that is no whole number is written with DIGITS digits.

    >>> calculate("(1/3 + 1/6) * 10"), calculate("2**10"), calculate("1/3"), calculate("0.1+0.2")
    ('5', '1024', '0.333333333333', '0.3')
    """
    if len(text) > LONGEST:
        raise ValueError(f"an expression may have {LONGEST} characters (got {len(text)})")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"no arithmetic: {text!r}") from error
    value = _value(tree.body)
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.{DIGITS}g}"


def _value(node: ast.expr) -> Fraction:
    """The value of a part of an expression; what LONGEST characters can nest, Python's stack can hold."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(str(number)) if abs(number) < LARGEST else Fraction(LARGEST + 1))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            try:
                return _bounded(Fraction(OPERATORS[type(op)](_value(left), _value(right))))
            except ZeroDivisionError as error:
                raise ValueError("a division by 0") from error
    raise ValueError(f"no arithmetic: {type(node).__name__}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > HIGHEST or (base == 0 and exponent < 0):
        raise ValueError(f"an exponent must be a whole number of at most {HIGHEST} (got {exponent}), and no 0**-1")
    return _bounded(Fraction(base**exponent.numerator))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("a value is too large")
    return value
