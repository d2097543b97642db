"""Near-duplicates against an exact comparison of all pairs."""

from __future__ import annotations

import random

import pytest

from rlpost.duplicates import Near, NearIndex, jaccard, near_duplicates, plain, shingles
from rlpost.errors import RunError

WORDS = [f"w{i}" for i in range(400)]


def changed(text: str, dice: random.Random, words: int) -> str:
    """The text with so many of its words exchanged."""
    parts = text.split()
    for i in dice.sample(range(len(parts)), words):
        parts[i] = dice.choice(WORDS)
    return " ".join(parts)


def pool(count: int = 300, *, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    first = [" ".join(dice.choices(WORDS, k=40)) for _ in range(count // 2)]
    return first + [changed(text, dice, dice.randint(1, 6)) for text in first]


def test_what_is_said_to_be_near_is_near_and_hardly_anything_is_missed():
    texts = pool(600)
    sets = [shingles(text, 3) for text in texts]
    said = near_duplicates(texts, threshold=0.6)
    kept: list[int] = []
    missed = found = 0
    for i, near in enumerate(said):
        best = max((jaccard(sets[i], sets[k]) for k in kept), default=0.0)
        if near is not None:
            assert near.similarity == pytest.approx(best) and near.similarity >= 0.6
            found += 1
        else:
            missed += best >= 0.6
            kept.append(i)
    assert found > 100
    assert missed <= 0.03 * found


def test_what_is_held_against_comes_first_and_places_are_those_of_the_given_lists():
    dice = random.Random(1)
    a, b = pool(2)
    near_a = changed(a, dice, 1)
    other = " ".join(reversed(a.split()))
    said = near_duplicates([other, near_a, near_a, b, other.upper()], [b, a], threshold=0.7)
    assert said[0] is None
    assert [(one.side, one.place) for one in said[1:] if one] == [
        ("against", 1),
        ("against", 1),
        ("against", 0),
        ("texts", 0),
    ]
    assert said[4] == Near("texts", 0, 1.0)


def test_case_and_spaces_make_no_difference_and_digits_do():
    assert plain("Is  7-0+6=13 ?") == plain("is 7 - 0 + 6 = 13?")
    assert near_duplicates(["7-0+6-3=", "7-0+6-4="], threshold=0.9) == [None, None]


def test_texts_shorter_than_a_shingle_are_compared_as_a_whole():
    assert near_duplicates(["2 + 2", "2 + 3", "2+2", ""], [""], shingle=5) == [
        None,
        None,
        Near("texts", 0, 1.0),
        Near("against", 0, 1.0),
    ]


def test_an_index_grows_and_finds_the_earlier_of_two():
    index = NearIndex()
    assert index.find("a b c d") is None
    assert (index.add("a b c d"), index.add("A b c D")) == (0, 1)
    assert index.find("a b c d") == (0, 1.0)
    assert (index.find_or_add("e f g h"), len(index)) == (None, 3)
    assert (index.find_or_add("e f g h"), len(index)) == ((2, 1.0), 3)


def test_bounds_are_said():
    with pytest.raises(RunError, match=r"threshold .* must be in \(0, 1\]"):
        near_duplicates([], threshold=0)
    with pytest.raises(RunError, match="at least one word"):
        NearIndex(shingle=0)
