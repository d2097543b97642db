"""Texts that say nearly the same: MinHash finds who may be near, an exact comparison decides.

Two texts are near where the Jaccard similarity |A and B| / |A or B| of their shingles, runs of `shingle` words, is at
least `threshold`. Broder, "On the resemblance and containment of documents", 1997. The library is datasketch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlpost.errors import RunError

NUM_PERM = 64
"""Hashes of a signature: with candidates compared exactly, more find hardly more."""
WIDER, WEIGHTS = 0.8, (0.1, 0.9)
"""Candidates are sought from a lower threshold on, and a false one weighs less than a missed one: it costs one exact
comparison."""
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Near:
    """The text that another is nearest to.

    >>> Near("against", 4, 0.9).place
    4
    """

    side: Literal["texts", "against"]
    """Among the texts that were asked about, or those that they were held against."""
    place: int
    similarity: float
    """Exact Jaccard similarity of the shingles, from the threshold to 1."""


class NearIndex:
    """Texts by their signature, for any number of questions; it grows by `add`."""

    def __init__(self, *, threshold: float = 0.8, shingle: int = 3) -> None:
        """`threshold`: similarity from which texts are near; `shingle`: words of a run."""
        if not 0 < threshold <= 1:
            raise RunError(f"threshold of near-duplicates must be in (0, 1] (got {threshold})")
        if shingle < 1:
            raise RunError(f"shingle of near-duplicates must be at least one word (got {shingle})")
        from datasketch import MinHashLSH

        self.threshold, self.shingle = threshold, shingle
        self._texts: list[str] = []
        self._exact: dict[str, int] = {}
        self._lsh = MinHashLSH(threshold=WIDER * threshold, num_perm=NUM_PERM, weights=WEIGHTS)
        self._empty: Any = None

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Take in a text; its place, counted from 0."""
        words = words_of(text)
        return self._insert(text, words, self._signature(runs_of(words, self.shingle)))

    def find(self, text: str) -> tuple[int, float] | None:
        """Place and similarity of the nearest text that was added, the earlier of two; None: none is near."""
        return self._look(text, add=False)

    def find_or_add(self, text: str) -> tuple[int, float] | None:
        """What `find` says; a text that is near to none is added."""
        return self._look(text, add=True)

    def _look(self, text: str, *, add: bool) -> tuple[int, float] | None:
        words = words_of(text)
        same = self._exact.get(" ".join(words))
        if same is not None:
            return same, 1.0
        found = runs_of(words, self.shingle)
        signature = self._signature(found)
        near = self._nearest(found, signature)
        if near is None and add:
            self._insert(text, words, signature)
        return near

    def _nearest(self, found: frozenset[str], signature: Any) -> tuple[int, float] | None:
        best: tuple[int, float] | None = None
        for place in sorted(self._lsh.query(signature)):
            similarity = jaccard(found, shingles(self._texts[place], self.shingle))
            if similarity >= self.threshold and (best is None or similarity > best[1]):
                best = place, similarity
        return best

    def _insert(self, text: str, words: Sequence[str], signature: Any) -> int:
        place = len(self._texts)
        self._texts.append(text)
        self._exact.setdefault(" ".join(words), place)
        self._lsh.insert(place, signature, check_duplication=False)
        return place

    def _signature(self, found: frozenset[str]) -> Any:
        from datasketch import MinHash

        if self._empty is None:  # its permutations, which take longest to make, are shared
            self._empty = MinHash(num_perm=NUM_PERM, hashfunc=zlib.crc32)  # which the library mixes further
        signature = self._empty.copy()
        signature.update_batch([shingle.encode() for shingle in found])
        return signature


def near_duplicates(
    texts: Sequence[str], against: Sequence[str] = (), *, threshold: float = 0.8, shingle: int = 3
) -> list[Near | None]:
    """For each text: what it is near to, first in `against`, else among the earlier texts that are near to none.

    Texts with None are therefore a choice of which no two are near each other, nor one near `against`.

    >>> near_duplicates(["A train leaves at 9.", "What is 2 + 2?", "a train leaves  at 9."], ["What is 2+2?"])
    [None, Near(side='against', place=0, similarity=1.0), Near(side='texts', place=0, similarity=1.0)]
    """
    held, seen = (NearIndex(threshold=threshold, shingle=shingle) for _ in range(2))
    for text in against:
        held.add(text)
    places: list[int] = []  # of the texts that `seen` has
    return [_judge(text, i, held, seen, places) for i, text in enumerate(texts)]


def _judge(text: str, i: int, held: NearIndex, seen: NearIndex, places: list[int]) -> Near | None:
    if (found := held.find(text)) is not None:
        return Near("against", *found)
    if (found := seen.find_or_add(text)) is not None:
        return Near("texts", places[found[0]], found[1])
    places.append(i)
    return None


def plain(text: str) -> str:
    """The words of a text, in lower case, one space between them: what is compared.

    >>> plain("What  is 2+2?")
    'what is 2 + 2 ?'
    """
    return " ".join(words_of(text))


def words_of(text: str) -> list[str]:
    """Words and single signs, in lower case."""
    return _WORD.findall(text.casefold())


def shingles(text: str, size: int) -> frozenset[str]:
    """Every run of `size` words; a shorter text is one run.

    >>> sorted(shingles("What is 2+2?", 5))
    ['is 2 + 2 ?', 'what is 2 + 2']
    """
    return runs_of(words_of(text), size)


def runs_of(words: Sequence[str], size: int) -> frozenset[str]:
    """The same of a text's words."""
    return frozenset([" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))])


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a and b| / |a or b|."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0
