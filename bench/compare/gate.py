"""When a difference counts as a loss: sides interleaved, base against itself beside, looked at again until it is clear.

A look at a case: per round every side is timed once, another first each time. Its change is the median of head's time
over the geometric mean of base's two, its noise that of base's one time over the other; both as logarithms.

Rounds cannot average out what lasts as long as a process (addresses and pages, and time with them): each look is one
measurement, and the next one has fresh processes. The first look only selects what may be slower, and since it selects
by being high it does not count. Then looks are added until the mean change is a loss (`relative` or more, and so many
standard errors from 0 that none of many cases gets there by chance), or hardly can be one, or they are used up. The
standard error takes what processes differ by from both the changes and base's noise, which is there without any
change: the two together know it well after three looks, and noise hides losses rather than inventing them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..timing import interleave, median_interval
from .sides import Side

SURE, CLEAR = 4.0, 2.0  # standard errors: of a loss from no change, of what is given up from a loss
LEAST_LOOKS, LEAST_TO_GIVE_UP = 3, 2
LEAST_NOISE = 0.005  # looks that agree by luck do not make sure
SHARE = 1.5  # variance of a change in that of a process: one over the mean of two. (Of a noise: 2)


@dataclass(frozen=True)
class Limits:
    """relative and absolute_s: smallest change that matters; rounds of each look; looks: most of them at a case that
    may be slower, the first one not counted."""

    relative: float = 0.05
    absolute_s: float = 0.2e-6
    rounds: int = 9
    looks: int = 12

    def matter(self, base_s: float, head_s: float) -> bool:
        return abs(head_s - base_s) >= self.absolute_s

    @property
    def least(self) -> float:
        """Smallest loss, as a logarithm."""
        return math.log1p(self.relative)


@dataclass(frozen=True)
class Look:
    """At one case in one set of processes; changes by round."""

    base_s: float
    head_s: float
    changes: tuple[float, ...]
    noise: float

    @property
    def change(self) -> float:
        return statistics.median(self.changes)


@dataclass(frozen=True)
class Change:
    """Of one case, head against base: ratios of times, above 1 is slower."""

    case: str
    base_s: float
    head_s: float
    ratio: float
    low: float  # interval of the ratio: of the first look's median, or two standard errors of the mean of more
    high: float
    noise: float  # base against itself: how far the ratio is from 1, in the root mean square of looks
    faster: bool
    looks: int = 1
    loss: bool = False


def look(case: str, sides: Mapping[str, Side], rounds: int) -> Look:
    """Measures a case on "base", "again" (base once more) and "head"."""
    seen = interleave({name: lambda side=side: side.seconds(case) for name, side in sides.items()}, rounds)
    base, again, head = seen["base"], seen["again"], seen["head"]
    both = [(a * b) ** 0.5 for a, b in zip(base, again, strict=True)]
    changes = tuple(math.log(h / b) for h, b in zip(head, both, strict=True))
    noise = statistics.median(math.log(a / b) for a, b in zip(again, base, strict=True))
    return Look(statistics.median(both), statistics.median(head), changes, noise)


def mean_change(looks: Sequence[Look]) -> tuple[float, float]:
    """The mean change of two looks or more, and its standard error."""
    mean, count = statistics.fmean(one.change for one in looks), len(looks)
    squares = sum((one.change - mean) ** 2 / SHARE + one.noise**2 / 2 for one in looks)
    variance = max(squares / (2 * count - 1), LEAST_NOISE**2)
    return mean, math.sqrt(SHARE * variance / count)


def is_loss(looks: Sequence[Look], limits: Limits) -> bool | None:
    """Whether the looks after the first one show a loss. None: another look has to tell."""
    if len(looks) < LEAST_TO_GIVE_UP:
        return None
    mean, error = mean_change(looks)
    if mean + CLEAR * error < limits.least:
        return False
    sure = mean >= limits.least and mean >= SURE * error and limits.matter(*seconds(looks))
    if len(looks) >= LEAST_LOOKS and sure:
        return True
    return False if len(looks) >= limits.looks else None


def seconds(looks: Sequence[Look]) -> tuple[float, float]:
    return statistics.median(one.base_s for one in looks), statistics.median(one.head_s for one in looks)


def compare(
    cases: Sequence[str],
    fresh: Callable[[], Mapping[str, Side]],
    limits: Limits,
    progress: Callable[[Look], Look] = lambda look: look,
) -> list[Change]:
    """One Change per case. `fresh` starts new sides for each look; all cases that are still open share them."""
    sides = fresh()
    first = {case: progress(look(case, sides, limits.rounds)) for case in cases}
    again: dict[str, list[Look]] = {case: [] for case in cases}
    loss: dict[str, bool | None] = {case: None if slower(first[case], limits) else False for case in cases}
    while still := [case for case in cases if loss[case] is None]:
        sides = fresh()
        for case in still:
            again[case].append(look(case, sides, limits.rounds))
            loss[case] = is_loss(again[case], limits)
    return [said(case, first[case], again[case], bool(loss[case]), limits) for case in cases]


def slower(first: Look, limits: Limits) -> bool:
    """Whether to look again: half the smallest loss, as the other half may be noise."""
    return limits.matter(first.base_s, first.head_s) and first.change >= math.log1p(limits.relative / 2)


def said(case: str, first: Look, again: Sequence[Look], loss: bool, limits: Limits) -> Change:
    looks = again or [first]
    base_s, head_s = seconds(looks)
    noise = math.expm1(math.sqrt(statistics.fmean(one.noise**2 for one in looks)))
    if again:
        change, error = mean_change(again)
        low, high = change - 2 * error, change + 2 * error
    else:
        change, (low, high) = first.change, median_interval(first.changes)
    faster = limits.matter(base_s, head_s) and change <= -limits.least and high < -math.log1p(noise)
    return Change(
        case, base_s, head_s, math.exp(change), math.exp(low), math.exp(high), noise, faster, 1 + len(again), loss
    )


def markdown(changes: Sequence[Change], base: str, head: str, only: Sequence[str] = ()) -> str:
    """A table for a pull request, losses first. only: cases that one side lacks."""
    losses = [c for c in changes if c.loss]
    lines = [
        f"**{len(losses)} of {len(changes)} cases slower** ({head} against {base})" if losses
        else f"**No confident loss** in {len(changes)} cases ({head} against {base})",
        "",
        "| case | base | head | change | interval | base with itself | |",
        "|---|---:|---:|---:|---|---|---|",
    ]  # fmt: skip
    for c in sorted(changes, key=lambda c: (not c.loss, -c.ratio)):
        verdict = "**slower**" if c.loss else "faster" if c.faster else ""
        lines.append(
            f"| {c.case} | {microseconds(c.base_s)} | {microseconds(c.head_s)} | {c.ratio - 1:+.1%} "
            f"| {c.low - 1:+.1%} to {c.high - 1:+.1%} | {c.noise:.1%} | {verdict} |"
        )
    if only:
        lines += ["", "Not compared, one side lacks them: " + ", ".join(only)]
    return "\n".join(lines) + "\n"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
