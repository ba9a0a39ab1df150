"""When a difference counts as a loss: sides interleaved, base against itself beside, looked at again until it is clear.

A look at a case: per round every side is timed once, another first each time. Its change is the median of head's time
over the geometric mean of base's two, its noise that of base's one time over the other; both as logarithms.

Rounds cannot average out what lasts as long as a process (addresses and pages, and time with them): each look is one
measurement, and the next one has fresh processes. Some processes are unlucky, by ten or fifty per cent: hence medians
of looks, and of how far they lie apart. First come three short looks, which only select what may be slower, and since
they select by being high they do not count. Then looks are added until their median is a loss (`relative` or more, and
so many standard errors from 0 that none of many cases gets there by chance), or hardly can be one, or they are used up.
The standard error takes what processes differ by from both the changes and base's noise, which is there without any
change: the two together know it well after five looks, and noise hides losses rather than inventing them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..timing import interleave, median_interval
from .sides import Side

SURE, CLEAR = 4.0, 2.0  # standard errors: of a loss from no change, of what is given up from a loss
SHORT_LOOKS, LEAST_LOOKS, LEAST_TO_GIVE_UP = 3, 5, 2
LEAST_NOISE = 0.005  # looks that agree by luck do not make sure
SHARE = 1.5  # variance of a change in that of a process: one over the mean of two. (Of a noise: 2)
DEVIATION = 1.4826  # standard deviation of a normal distribution in median deviations
OF_A_MEDIAN = 1.2533  # standard error of a median in that of a mean


@dataclass(frozen=True)
class Limits:
    """relative and absolute_s: smallest change that matters; rounds of a look; looks: most of them at a case that may
    be slower, the short ones not counted."""

    relative: float = 0.05
    absolute_s: float = 0.2e-6
    rounds: int = 9
    looks: int = 20

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
    low: float  # interval of the ratio: of the rounds' median, or two standard errors of that of looks
    high: float
    noise: float  # base against itself: how far the ratio is from 1, in the median of looks
    faster: bool
    looks: int = 1  # the short ones are one
    loss: bool = False


def look(case: str, sides: Mapping[str, Side], rounds: int) -> Look:
    """Measures a case on "base", "again" (base once more) and "head"."""
    seen = interleave({name: lambda side=side: side.seconds(case) for name, side in sides.items()}, rounds)
    base, again, head = seen["base"], seen["again"], seen["head"]
    both = [(a * b) ** 0.5 for a, b in zip(base, again, strict=True)]
    changes = tuple(math.log(h / b) for h, b in zip(head, both, strict=True))
    noise = statistics.median(math.log(a / b) for a, b in zip(again, base, strict=True))
    return Look(statistics.median(both), statistics.median(head), changes, noise)


def median_change(looks: Sequence[Look]) -> tuple[float, float]:
    """The median change of two looks or more, and its standard error."""
    median, count = statistics.median(one.change for one in looks), len(looks)
    apart = [abs(one.change - median) / math.sqrt(SHARE) for one in looks]
    apart += [abs(one.noise) / math.sqrt(2) for one in looks]
    process = DEVIATION * statistics.median(apart) * (1 + 1 / count)  # few looks lie too near to their own median
    return median, OF_A_MEDIAN * math.sqrt(SHARE / count) * max(process, LEAST_NOISE)


def is_loss(looks: Sequence[Look], limits: Limits) -> bool | None:
    """Whether the looks after the short ones show a loss. None: another look has to tell."""
    if len(looks) < LEAST_TO_GIVE_UP:
        return None
    median, error = median_change(looks)
    if median + CLEAR * error < limits.least:
        return False
    sure = median >= limits.least and median >= SURE * error and limits.matter(*seconds(looks))
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
    first: dict[str, list[Look]] = {case: [] for case in cases}
    for number in range(SHORT_LOOKS):
        sides = fresh()
        for case in cases:
            seen = look(case, sides, max(1, limits.rounds // SHORT_LOOKS))
            first[case].append(progress(seen) if number + 1 == SHORT_LOOKS else seen)
    again: dict[str, list[Look]] = {case: [] for case in cases}
    loss: dict[str, bool | None] = {case: None if slower(first[case], limits) else False for case in cases}
    while still := [case for case in cases if loss[case] is None]:
        sides = fresh()
        for case in still:
            again[case].append(look(case, sides, limits.rounds))
            loss[case] = is_loss(again[case], limits)
    return [said(case, first[case], again[case], bool(loss[case]), limits) for case in cases]


def slower(first: Sequence[Look], limits: Limits) -> bool:
    """Whether to look again: half the smallest loss, as the other half may be noise."""
    change = statistics.median(one.change for one in first)
    return limits.matter(*seconds(first)) and change >= math.log1p(limits.relative / 2)


def said(case: str, first: Sequence[Look], again: Sequence[Look], loss: bool, limits: Limits) -> Change:
    looks = again or first
    base_s, head_s = seconds(looks)
    noise = math.expm1(statistics.median(abs(one.noise) for one in looks))
    if again:
        change, error = median_change(again)
        low, high = change - 2 * error, change + 2 * error
    else:
        change = statistics.median(one.change for one in first)
        low, high = median_interval([c for one in first for c in one.changes])
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
