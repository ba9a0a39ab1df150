"""Learning rates by step: warmup-stable-decay (Memory3, arXiv 2407.01178, section 4.3) and cosine (section 6.1)."""

from __future__ import annotations

import math

SCHEDULES = ("wsd", "cosine")


def rate(step: int, steps: int, *, kind: str = "wsd", warmup: int = 0, decay: float = 0.1, floor: float = 0.0) -> float:
    """Factor on the highest learning rate at `step` (0 the first) of `steps`.

    warmup   steps of linear rise; decay: share of the steps that falls linearly at the end ("wsd")
    floor    where it ends, as a factor
    Steps past the end keep the floor. Raises ValueError for an unknown kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {kind!r}")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "wsd":
        begin = max(warmup, steps - round(decay * steps))
        if step < begin:
            return 1.0
        return floor + (1 - floor) * max(0.0, 1 - (step + 1 - begin) / max(1, steps - begin))
    done = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
