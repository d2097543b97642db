"""Whether an answer keeps to one script: models that are trained on results alone begin to mix languages."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from rlpost.types import Rollout


def language(rollout: Rollout, *, script: str = "LATIN", at_least: float = 0.0) -> float:
    """Share of the text's letters that belong to a script, such as LATIN, CJK, CYRILLIC; 1 where there are none.

    The share of target-language words of DeepSeek-R1, arXiv:2501.12948, section 2.3.2, with letters for words.
    `at_least`: below this share it is 0. Greek letters count as every script's: mathematics is written with them.
    """
    letters = [letter for letter in rollout.text if letter.isalpha()]
    own = sum(script_of(letter) in (script.upper(), "GREEK") for letter in letters)
    share = own / len(letters) if letters else 1.0
    return share if share >= at_least else 0.0


@lru_cache(maxsize=4096)
def script_of(letter: str) -> str:
    """The first word of a letter's name in Unicode.

    >>> [script_of(letter) for letter in ("a", "\\u00e4", "\\u0434", "\\u4e2d")]
    ['LATIN', 'LATIN', 'CYRILLIC', 'CJK']
    """
    return unicodedata.name(letter, "NONE").split()[0]
