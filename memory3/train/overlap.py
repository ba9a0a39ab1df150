"""How much of a reference already stands in a text: the guard against leaking what is to be predicted.

Memory3, arXiv 2407.01178, equation 6: overlap(t, r) = max N / |r| over the common subsequences of t and r whose N
tokens lie within 2|r| of each other in t. A reference that overlaps its training sequence by more than 90 % is refused,
one that overlaps an evaluation question by more than 2/3 likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

TRAINING_LIMIT = 0.9
EVALUATION_LIMIT = 2 / 3


def overlap(text: Sequence[Hashable], reference: Sequence[Hashable], above: float = 0.0) -> float:
    """Share of `reference`, 0..1, that is a common subsequence with a window of `text` (first to last token <= 2|r|).

    above: results up to this are of no interest; returns 0 then, and looks at far fewer windows.
    Raises ValueError for an empty reference.
    """
    if not reference:
        raise ValueError("reference: expected at least one token, got none")
    length = len(reference)
    masks: dict[Hashable, int] = {}
    for i, token in enumerate(reference):
        masks[token] = masks.get(token, 0) | 1 << i
    best = int(above * length + 1e-9)
    floor = best
    window = 2 * length + 1
    # What a window shares with the reference as a multiset bounds its common subsequences, and slides in O(1).
    need, have, shared = Counter(reference), Counter(), 0
    for end in range(min(window - 1, len(text))):
        shared += _enter(have, need, text[end])
    for start in range(len(text)):
        if start + window <= len(text):
            shared += _enter(have, need, text[start + window - 1])
        if shared > best and text[start] in masks:
            best = max(best, _common(text[start : start + window], masks, length))
        token = text[start]
        have[token] -= 1
        shared -= have[token] < need[token]
    return best / length if best > floor else 0.0


def refused(text: Sequence[Hashable], reference: Sequence[Hashable], limit: float = TRAINING_LIMIT) -> bool:
    """Whether `reference` gives away more than `limit` of itself in `text`."""
    return overlap(text, reference, above=limit) > limit


def _enter(have: Counter, need: Counter, token: Hashable) -> bool:
    have[token] += 1
    return have[token] <= need[token]


def _common(text: Sequence[Hashable], masks: dict[Hashable, int], length: int) -> int:
    """Length of the longest common subsequence, one row of the table as the bits of an integer.

    The recurrence is Hyyro's (Bit-parallel LCS-length computation revisited, 2004): zero bits of the row are the
    places where the length grows.
    """
    full = (1 << length) - 1
    row = full
    for token in text:
        matches = row & masks.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return length - row.bit_count()
