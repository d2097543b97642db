"""Rules for the text of a problem."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlpost.synth.rows import Row

REACH = 20
"""Words of the longest run whose copies are looked for."""


def rules(
    row: Row,
    *,
    min_chars: int = 4,
    max_chars: int = 8000,
    repeated: int = 5,
    pattern: str | None = None,
    language: str | None = None,
) -> str | None:
    """Why a problem goes, or None: cut off, too short or long, a run of words repeated, the form, the language.

    `repeated`: as many copies of one run of words in a row, or of one character ten times as often, is a model that
    is stuck. `pattern`: a regular expression that the whole problem must match. `language`: a script such as `latin`,
    `cyrillic` or `han`, to which nine of ten letters must belong.
    """
    text = row["prompt"]
    if row["finish"] != "stop":
        return "cut off"
    if not min_chars <= len(text) <= max_chars:
        return "too short" if len(text) < min_chars else "too long"
    if is_stuck(text, repeated):
        return "repetition"
    if pattern is not None and not re.fullmatch(pattern, text):
        return "form"
    if language is not None and not is_written_in(text, language):
        return "language"
    return None


def is_stuck(text: str, times: int) -> bool:
    """Whether a run of up to 20 words stands `times` or more in a row, or a character ten times as often.

    >>> is_stuck("so we get so we get so we get so we get so we get", 5), is_stuck("7-0+6-3=", 5)
    (True, False)
    """
    if re.search(rf"(.)\1{{{10 * times - 1},}}", text, re.DOTALL):
        return True
    words = text.split()
    if longest_echo(words) < times - 1:  # most texts end here; the rest looks at every length of a run
        return False
    for size in range(1, min(REACH, len(words) // times) + 1):
        same = 0
        for i in range(size, len(words)):
            same = same + 1 if words[i] == words[i - size] else 0
            if same >= size * (times - 1):
                return True
    return False


def longest_echo(words: Sequence[str]) -> int:
    """The longest stretch in which every word stood among the `REACH` words before it: a run repeated is one.

    >>> longest_echo("a b a b a b".split()), longest_echo("a b c d".split())
    (4, 0)
    """
    last: dict[str, int] = {}
    longest = stretch = 0
    for i, word in enumerate(words):
        if i - last.get(word, -REACH - 1) > REACH:
            stretch = 0
        else:
            stretch += 1
            longest = max(longest, stretch)
        last[word] = i
    return longest


def is_written_in(text: str, script: str) -> bool:
    """Whether nine of ten letters are of a script, by their names in Unicode.

    >>> is_written_in("Sei x eine Zahl", "latin"), is_written_in("设 x 为一个数", "latin")
    (True, False)
    """
    import unicodedata

    names = {"han": "CJK"}
    wanted = names.get(script.lower(), script.upper())
    letters = [one for one in text if one.isalpha()]
    return sum(unicodedata.name(one, "").startswith(wanted) for one in letters) >= 0.9 * len(letters)
