"""Numbers as people write them, compared exactly."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(
    r"(?:(?<![\d)])-)?\s?\\?\$?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\d)])-)?\.\d+", re.ASCII
)
"""An optional sign and dollar, digits with or without thousands commas, an optional fraction; `5-3` is 5 and 3."""


def as_number(text: str) -> Decimal | None:
    """The one number that `text` is, or None.

    >>> as_number("$1,000.50"), as_number("72 apples")
    (Decimal('1000.50'), None)
    """
    text = text.strip().removesuffix(".")
    if not NUMBER.fullmatch(text):
        return None
    return Decimal(re.sub(r"[\s\\$,]", "", text))  # any length: unlike int, Decimal has no limit on digits
