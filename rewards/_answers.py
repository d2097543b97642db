r"""Whether two answers are the same, as strictly as mathematics has it, and whichever of the two is the reference.

Numbers are compared exactly: `1/3` is not `0.333`. Order counts in `(1, 2)` and not in `\{1, 2\}` or `1, 2`; brackets
count; a unit may be left out and not be another. `50\%` is `50` and `0.5`: data sets write all three for one answer.
What is neither number, word nor list of these goes to `math_verify`, bounded in size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from rewards._quantity import LONGEST, WORDS_OF_MATHS, number

_ENVIRONMENTS = frozenset(["matrix", "pmatrix", "bmatrix", "vmatrix", "array", "cases"])
LARGEST_EXPONENT, LARGEST_FACTORIAL = 1000, 500

_RELATION = re.compile(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|ne|neq)(?![a-zA-Z])|\\in\b")
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!> ]|\\q?quad\b|~|\\(?:display|text)style\b|\\(?:left|right|big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])"
)
_DOLLAR = re.compile(r"\\\$|(?<![\\\d])\$(?=\s*[\d.])")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|rm|operatorname)\s*\{([^{}]*)\}")
_NAMED = re.compile(r"^(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{?\w+\}?)?(?:\([a-z](?:,\s*[a-z])*\))?\s*(?:=|\\in\b)\s*(?![=])")
_AND = re.compile(r",?\s+(?:and|or)\s+|\s*\\(?:lor|vee)\b\s*|;\s*", re.IGNORECASE)


def equal(a: str, b: str, symbolic: Callable[[str, str], bool] | None = None) -> bool:
    r"""Whether two answers are the same; `symbolic` compares expressions that are no plain numbers.

    >>> equal(r"\frac{1}{2}", "0.5"), equal("(1,2)", "(2,1)"), equal("1, 2", "2 and 1"), equal("3 cm", "3 m")
    (True, False, True, False)
    """
    a, b = clean(a), clean(b)
    if not a or not b:
        return False
    if a == b:
        return True
    if max(len(a), len(b)) > LONGEST:
        return False
    return _same(a, b, symbolic) or _same(_unnamed(a, b), _unnamed(b, a), symbolic)


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    r"""An answer without what only looks: dollars around it, boxes, spacing, fonts, a full stop at the end.

    >>> clean(r"$\boxed{\dfrac12}$."), clean(r"\text{ Evelyn}"), clean(r"1{,}000")
    ('\\frac{1}{2}', 'Evelyn', '1,000')
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-").replace("\\%", "%").replace("\N{INFINITY}", r"\infty")
    text = re.sub(r"\\varnothing|\N{EMPTY SET}|\\\{\s*\\\}", r"\\emptyset", text)
    while (bare := _unwrapped(text)) != text:
        text = bare
    text = re.sub(r"\\\s*[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\{", "\0").replace("\\}", "\1")
    text = _DOLLAR.sub("¤", text).replace("$", "").replace("¤", "$")
    text = _TEXT.sub(r" \1 ", _SPACES.sub(" ", text))
    return " ".join(text.replace("\0", "\\{").replace("\1", "\\}").split())


def _unwrapped(text: str) -> str:
    text = text.strip().rstrip(".").strip() if not re.search(r"\d\.$", text.strip()) else text.strip()[:-1]
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            inner = text[len(start) : -len(end)]
            if start not in inner:
                return inner.strip()
    for start in (r"\boxed", r"\fbox"):
        if text.startswith(start) and (inside := held(text, len(start))) and inside[1] == len(text):
            return inside[0].strip()
    return text


def held(text: str, start: int) -> tuple[str, int] | None:
    """What the braces that open at `start` hold, and where they have closed; None where they do not."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if not text.startswith("{", start):
        return None
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if not depth:
                return text[start + 1 : i], i + 1
    return None


def _unnamed(text: str, other: str) -> str:
    """`x = 5` is 5, unless the other answer names something else."""
    mine, theirs = _NAMED.match(text), _NAMED.match(other)
    if mine is None or (theirs is not None and theirs.group().replace(" ", "") != mine.group().replace(" ", "")):
        return text
    return text[mine.end() :].strip() or text


def _same(a: str, b: str, symbolic: Callable[[str, str], bool] | None) -> bool:
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x.same(y)
    if not (_RELATION.search(a) or _RELATION.search(b)):
        one, other = _collection(a) or _listed(a), _collection(b) or _listed(b)
        if one is not None and other is not None:
            kinds = {one[0], other[0]}
            return (len(kinds) == 1 or kinds == {"set", "list"}) and _same_items(one[0], one[1], other[1], symbolic)
        if one is not None or other is not None:
            return _alone(a, b, symbolic) or _alone(b, a, symbolic)
    if _is_words(a) or _is_words(b):
        return _same_words(a, b) or _same_words(b, a)
    if _bare(a) == _bare(b):
        return True
    return symbolic is not None and is_expression(a) and is_expression(b) and symbolic(a, b)


def _same_words(a: str, b: str) -> bool:
    """Words whatever their case, a lone letter as it is written, and a choice with or without its brackets."""
    if re.fullmatch(r"\([A-Za-z]\)", a):
        return a[1] == b
    return _is_words(a) and _is_words(b) and (a == b or (len(a) > 1 and a.casefold() == b.casefold()))


def _alone(a: str, b: str, symbolic: Callable[[str, str], bool] | None) -> bool:
    r"""`\{1\}` is 1."""
    items = _collection(a)
    return items is not None and items[0] == "set" and len(items[1]) == 1 and equal(items[1][0], b, symbolic)


def _same_items(kind: str, a: list[str], b: list[str], symbolic: Callable[[str, str], bool] | None) -> bool:
    """In order where the brackets say so, else each with one of the others."""
    if len(a) != len(b):
        return False
    if kind not in ("set", "list", "union"):
        return all(equal(x, y, symbolic) for x, y in zip(a, b, strict=True))
    left = list(b)
    for x in a:
        match = next((i for i, y in enumerate(left) if equal(x, y, symbolic)), None)
        if match is None:
            return False
        del left[match]
    return True


def _collection(text: str) -> tuple[str, list[str]] | None:
    """(kind, items) of something in brackets with a comma in it, of a set, or of a union of these."""
    pieces = _split(text, r"\\cup\b|\u222a")
    if len(pieces) > 1:
        return "union", pieces
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", _split(text[2:-2], ",")
    if text.startswith("{") and (inside := held(text, 0)) and inside[1] == len(text):
        return "set", _split(inside[0], ",")
    if text[:1] in "([" and text[-1:] in ")]" and _closes_at_end(text):
        items = _split(text[1:-1], ",")
        if len(items) > 1:
            return text[0] + text[-1], items
    return None


def _listed(text: str) -> tuple[str, list[str]] | None:
    """Several answers without brackets around them; the two of a plus-minus are two."""
    items = [item for piece in _split(text, _AND.pattern) for item in _split(piece, ",")]
    if any(re.match(r"0\d", item) for item in items[1:]):
        return None  # 1,000 is no two answers
    items = [one for item in items for one in _both_signs(item)]
    return ("list", items) if len(items) > 1 else None


def _both_signs(text: str) -> list[str]:
    found = re.search(r"\\pm(?![a-zA-Z])|±", text)
    if found is None or re.search(r"\\pm(?![a-zA-Z])|±", text[found.end() :]):
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [before + ("+" if before.strip() else "") + after.strip(), f"{before}-{after.strip()}"]


def _split(text: str, separator: str) -> list[str]:
    """Pieces between separators that stand outside of every bracket."""
    pieces, start, depth = [], 0, 0
    finder = re.compile(separator, re.IGNORECASE)
    i = 0
    while i < len(text):
        found = finder.match(text, i) if not depth else None
        if found is not None and found.end() > i:
            pieces.append(text[start:i])
            start = i = found.end()
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        i += 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for i, letter in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if not depth:
            return i == len(text) - 1
    return False


def _is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", text)) and (
        len(text) == 1 or not set(text.lower().split()) & WORDS_OF_MATHS
    )


def _bare(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text).replace(r"\cdot", "*").replace(r"\times", "*")


def is_expression(text: str) -> bool:
    r"""Whether a text is mathematics alone, and small enough to be worked out: no words, no towers, no huge factorials.

    >>> [is_expression(text) for text in (r"\sqrt{2}+x", "5 (not 6)", "9^{9^{9^9}}", "10^{9999}")]
    [True, False, False, False]
    """
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text)
    if any(word.lower() not in WORDS_OF_MATHS | _ENVIRONMENTS for word in words) or re.search(
        r"(?<![_\d])\d+\s+\d", text
    ):
        return False
    if re.search(r"\d[\s)}]*\^[\s({]*\d+[\s)}]*\^|!\s*[)}]*\s*!|\^[\s({]*\d+\s*!", text):
        return False
    powers = [int(power[:6]) for power in re.findall(r"(?:\^|\*\*)[\s({-]*(\d+)", text)]
    factorials = [int(base[:6]) for base in re.findall(r"(\d+)\s*[)}]*\s*!", text)]
    choose = [int(base[:6]) for base in re.findall(r"binom\s*\{?(\d+)", text)]
    return (
        max(powers, default=0) <= LARGEST_EXPONENT
        and max(factorials, default=0) <= LARGEST_FACTORIAL
        and max(choose, default=0) <= LARGEST_EXPONENT
        and len(re.findall(r"\d{40}", text)) == 0
    )
