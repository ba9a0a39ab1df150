"""The gate's own test: a tree against itself (every loss is a false alarm), and with every call made slower."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report import progress
from .gate import Limits, compare
from .sides import Workers

COMPARISONS = 200
PLANTED = 1.10


def run(
    found: dict[str, list], cases: Sequence[str], tree: Path, limits: Limits, threads: int, comparisons: int,
    planted: int, end: float, save: Callable[[], None],
) -> None:  # fmt: skip
    """Adds to found["self"] and found["planted"], one entry per comparison, until there are enough or time is up.

    Both sides are one tree, so that operands are made once for all processes. Those read back lie on ordinary pages.
    """
    with tempfile.TemporaryDirectory(prefix="memory3-compare-") as kept:
        for kind, wanted, slower in (("planted", planted, PLANTED), ("self", comparisons, 1.0)):
            with Workers(tree, tree, threads, slower, Path(kept)) as workers, progress(kind, wanted) as step:
                longest = 0.0
                while len(found[kind]) < wanted and time.monotonic() + longest < end:
                    begin = time.monotonic()
                    changes = compare(cases, workers.fresh, limits)
                    took = time.monotonic() - begin
                    found[kind].append(
                        {
                            "seconds": round(took, 2),
                            "losses": [c.case for c in changes if c.loss],
                            "looks": {c.case: c.looks for c in changes if c.looks > 1},
                            "noise": {c.case: round(c.noise, 5) for c in changes},
                            "ratio": {c.case: round(c.ratio, 5) for c in changes},
                        }
                    )
                    step(None)
                    longest = max(longest, took)
                    save()


def summary(found: dict[str, list], cases: Sequence[str]) -> dict[str, Any]:
    """Shares of comparisons with a false alarm, and of planted slowdowns found (one per case and comparison)."""
    alarms = sum(bool(one["losses"]) for one in found["self"])
    planted = len(found["planted"]) * len(cases)
    seen = sum(len(one["losses"]) for one in found["planted"])
    return {
        "comparisons": len(found["self"]),
        "cases": len(cases),
        "false_alarms": alarms,
        "false_alarm_rate": alarms / len(found["self"]) if found["self"] else None,
        "planted": planted,
        "planted_slowdown": PLANTED - 1,
        "detected": seen,
        "detection_rate": seen / planted if planted else None,
    }
