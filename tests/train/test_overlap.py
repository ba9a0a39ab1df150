"""The overlap filter against brute force."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.train.overlap import EVALUATION_LIMIT, TRAINING_LIMIT, overlap, refused


def brute(text, reference) -> float:
    """By the definition: every set of places of the text within 2|r|, longest first, tried as a subsequence of r."""
    for n in range(min(len(text), len(reference)), 0, -1):
        for places in combinations(range(len(text)), n):
            if places[-1] - places[0] > 2 * len(reference):
                continue
            rest = iter(reference)
            if all(text[i] in rest for i in places):
                return n / len(reference)
    return 0.0


letters = st.integers(0, 3)


@settings(max_examples=300, deadline=None)
@given(st.lists(letters, max_size=11), st.lists(letters, min_size=1, max_size=4))
def test_is_the_definition(text, reference):
    assert overlap(text, reference) == brute(text, reference)


def table(text, reference) -> float:
    """By the textbook's table in every window; fit for longer texts."""
    best, window = 0, 2 * len(reference) + 1
    for start in range(len(text)):
        row = [0] * (len(reference) + 1)
        for token in text[start : start + window]:
            before = row[:]
            for j, other in enumerate(reference):
                row[j + 1] = before[j] + 1 if token == other else max(before[j + 1], row[j])
        best = max(best, row[-1])
    return best / len(reference)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(0, 150), st.integers(2, 40))
def test_longer_texts_and_references_past_one_machine_word(seed, length, extra, vocabulary):
    rng = random.Random(seed)
    reference = [rng.randrange(vocabulary) for _ in range(length)]
    text = [rng.randrange(vocabulary) for _ in range(extra)]
    copied = [t for t in reference if rng.random() < 0.8]
    at = rng.randrange(len(text) + 1)
    text[at:at] = copied
    exact = table(text, reference)
    assert overlap(text, reference) == exact
    for limit in (0.3, EVALUATION_LIMIT, TRAINING_LIMIT):
        assert overlap(text, reference, above=limit) == (exact if exact > limit else 0.0)
        assert refused(text, reference, limit) == (exact > limit)


def test_a_common_subsequence_must_lie_close_together():
    assert overlap([1, 0, 0, 0, 2], [1, 2]) == 1.0
    assert overlap([1, 0, 0, 0, 0, 2], [1, 2]) == 0.5


def test_more_than_ninety_per_cent():
    reference = list(range(10))
    assert not refused([99, *reference[:9], 98], reference)
    assert refused([99, *reference, 98], reference)
    with pytest.raises(ValueError, match="reference"):
        overlap([1], [])
