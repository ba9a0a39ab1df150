"""Slopes in a log-log plot."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exponents(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(by least squares over all points, between the last two) of positive points ascending in x.

    Raises ValueError for fewer than two points or values that have no logarithm.
    """
    if len(points) < 2 or any(x <= 0 or y <= 0 for x, y in points):
        raise ValueError(f"points: expected at least two, all positive, got {list(points)}")
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    overall = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return overall, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
