"""Interleaved runs and what is said about them: medians and spreads, never a single best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Summary:
    """Of repeated measurements: median, and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Raises ValueError without a value."""
        values = sorted(values)
        if not values:
            raise ValueError("values: expected at least one measurement, got none")
        return cls(statistics.median(values), quantile(values, 0.25), quantile(values, 0.75), len(values))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Value at a share of the way through ascending values, between neighbours by straight line."""
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def median_interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval that holds the true median with at least this probability, whatever the distribution.

    By order statistics (the sign test turned round): of 9 values the second smallest and the second largest. Up to 5
    values cannot give 95 %: then all of them, from the smallest to the largest. Raises ValueError without a value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("values: expected at least one measurement, got none")
    count = len(ordered)
    outside, cut = 2 * 0.5**count, 0  # probability that the median lies beyond the (cut + 1)-th value of either end
    while True:
        more = outside + 2 * 0.5**count * math.comb(count, cut + 1)
        if more > 1 - confidence or 2 * (cut + 1) >= count:
            return ordered[cut], ordered[count - 1 - cut]
        outside, cut = more, cut + 1


def interleave(arms: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 1) -> dict[str, list[Result]]:
    """Results of every arm, one run of each per round; rounds start with a different arm in turn.

    What drifts on the machine then drifts for all arms alike, and no arm always follows the same other one.
    """
    names = list(arms)
    seen: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            result = arms[name]()
            if number >= 0:
                seen[name].append(result)
    return seen


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """values / base, round by round: drift of the machine cancels. Raises ValueError for different lengths."""
    if len(values) != len(base):
        raise ValueError(f"base: expected {len(values)} runs, one per round, got {len(base)}")
    return [v / b for v, b in zip(values, base, strict=True)]
