"""Numbers as they are written, exactly, with their units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400
"""Characters of a number."""
WORDS_OF_MATHS = frozenset(
    [
        *("pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "infinity", "infty", "mod"),
        *("theta", "alpha", "beta", "gamma", "lambda", "phi", "i", "e", "x", "y", "z", "n"),
    ]
)
_ONE_LETTER_UNITS = frozenset("mgshlLNJWVAKCF")
_NO_UNITS = frozenset(["and", "or", "not", "but", "to", "than", "plus", "minus"])
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_TIMES = r"(?:\\times|\\cdot|[*x\u00d7\u00b7])"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+])?\s*(?P<coin>[$€£¥])?\s*(?:
        (?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<up>-?\d+)\s*\}}\s*\{{\s*(?P<down>-?\d+)\s*\}}
        | (?:(?P<whole2>\d+)\s+)?(?P<up2>\d+)\s*/\s*(?P<down2>\d+)
        | (?P<before>\d*)\.(?P<after>\d*)\\overline\{{(?P<again>\d+)\}}
        | 10\s*(?:\^|\*\*)\s*\{{?(?P<ten>[-+]?\d{{1,4}})\}}?
        | (?P<decimal>{_DIGITS})(?:\s*(?:[eE]|{_TIMES}\s*10\s*(?:\^|\*\*))\s*\{{?\(?(?P<power>[-+]?\d{{1,4}})\)?\}}?)?
    )(?:\s*(?P<percent>\\?%|percent\b))?(?P<unit>.*)""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_UNIT = re.compile(r"(?:\^\{?\\circ\}?|°)\s*[CFK]?|[a-zA-Z]+(?:[ ./*·]+[a-zA-Z]+)*\.?(?:\s*\^\s*\{?-?[1-4]\}?)?")


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number as it was written.

    >>> number("1,000.50"), number("3 cm").unit, number("5x")
    (Number(value=Fraction(2001, 2), percent=False, unit=''), 'cm', None)
    """

    value: Fraction
    percent: bool = False
    unit: str = ""

    def same(self, other: Number) -> bool:
        """Whether both are one number, of one unit where both have one."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if (self.percent and other.unit) or (other.percent and self.unit):
            return False
        if self.percent == other.percent:
            return self.value == other.value
        share, plain = (self, other) if self.percent else (other, self)
        return plain.value in (share.value, share.value / 100)


def number(text: str) -> Number | None:
    """The one number that a clean text is, with its unit; None for anything else."""
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > LONGEST:
        return None
    unit = _unit(found["unit"])
    if unit is None or (found["percent"] and unit):
        return None
    whole, up = found["whole"] or found["whole2"], found["up"] or found["up2"]
    if up is not None:
        down = int(found["down"] or found["down2"])
        if not down:
            return None
        value = Fraction(int(up), down) + int(whole or 0)
    elif found["again"] is not None:
        again, after = found["again"], found["after"]
        tail = Fraction(int(after + again) - int(after or 0), 10 ** len(after) * (10 ** len(again) - 1))
        value = int(found["before"] or 0) + tail
    elif found["ten"] is not None:
        value = Fraction(10) ** int(found["ten"])
    else:
        value = Fraction(found["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** int(found["power"] or 0)
    coin = {None: "", "$": "dollar"}.get(found["coin"], found["coin"])
    if coin and unit and unit != coin:
        return None
    return Number(-value if found["sign"] == "-" else value, bool(found["percent"]), coin or unit)


def _unit(text: str) -> str | None:
    """A unit in one spelling; empty where there is none, None where the text is more than a unit."""
    bare = text.strip()
    if not bare:
        return ""
    if not _UNIT.fullmatch(bare):
        return None
    if bare.startswith(("^", "\N{DEGREE SIGN}")):
        return "degree" + bare[-1] if bare[-1] in "CFK" else "degree"
    words = re.findall(r"[a-zA-Z]+", bare)
    touches = not text[0].isspace() and len(words[0]) < 2  # 5x is a product
    if touches or len(words) > 4 or not all(map(_may_be_unit, words)):
        return None
    bare = re.sub(r"\s*\^\s*\{?(-?\d)\}?", r"^\1", bare.rstrip("."))
    return re.sub(r"(?<=[a-z]{2})s\b", "", bare if len(words[0]) < 3 else bare.lower())


def _may_be_unit(word: str) -> bool:
    return (len(word) > 1 and word.lower() not in WORDS_OF_MATHS | _NO_UNITS) or word in _ONE_LETTER_UNITS
