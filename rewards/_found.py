"""Where in a text the final answer stands."""

from __future__ import annotations

import re

from rewards._answers import held

MARKER = re.compile(
    r"####|(?:final\s+|correct\s+)?answer\s*(?:is|:|=)\s*:?|(?<=\n)\s*answer\s*:|\bit is therefore\b", re.IGNORECASE
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_END_OF_SENTENCE = re.compile(r"\n|\.(?=\s|$)|[!?](?=\s[A-Z]|\s*$)|,\s+(?:so|since|because|which|as|but)\b")


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` that closes holds; None where there is none, or where the very last stays open.

    >>> boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}"), boxed(r"\boxed{1} \boxed{2")
    ('\\frac{1}{2}', None)
    """
    boxes = list(_BOX.finditer(text))
    outer = [box for i, box in enumerate(boxes) if not any(_holds(text, before, box) for before in boxes[:i])]
    if not outer:
        return None
    inside = held(text, outer[-1].end())
    return None if inside is None else inside[0].strip() or None


def _holds(text: str, outer: re.Match[str], inner: re.Match[str]) -> bool:
    inside = held(text, outer.end())
    return inside is not None and inner.start() < inside[1]


def marked(text: str) -> str | None:
    """What follows the last `####` or "answer is", up to the end of the sentence.

    >>> marked("The answer is 5. Or not?"), marked("5")
    ('5', None)
    """
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :].lstrip(" \t\n*:")
    return _END_OF_SENTENCE.split(rest, maxsplit=1)[0].strip(" *").strip() or None
