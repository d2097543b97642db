"""Where a text that ends an answer is complete, in tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence


def first_stop(
    ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> tuple[int, str] | None:
    """How many tokens there are up to the one that completes the first of these texts, and which; None: none is there.

    >>> first_stop([97, 93, 98], ["]", "b"], lambda ids: "".join(map(chr, ids)))
    (2, ']')
    """

    def found(length: int) -> str | None:
        text = decode(ids[:length])
        return next((one for one in stop if one in text), None)

    if not stop or found(len(ids)) is None:
        return None
    length = len(ids)
    if found(length - 1) is not None:  # as a generator that stops there does not have it
        length = bisect_left(range(length), True, key=lambda n: found(n) is not None)
    return length, str(found(length))
