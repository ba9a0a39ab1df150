"""When a difference counts as a loss: sides interleaved, the noise of base with itself beside, suspects measured again.

Per round and case every side is timed once, another first each time. The change is head's time over the geometric mean
of base's two, its noise the one base's time over the other. A case is suspect when all hold:
  - the median change is at least `relative`, and `absolute_s` per call
  - the interval of the change (order statistics) lies wholly above what base differs from itself by
Suspects are measured again with more rounds in fresh processes (addresses and pages differ from process to process, and
time with them), and so is what looks slower within the noise, up to five times; only what is then suspect three times
is a loss: rare enough of an honest case, and a real loss may be missed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..timing import Summary, interleave, median_interval
from .sides import Side


@dataclass(frozen=True)
class Limits:
    """relative: smallest change that matters; rounds of the first look, twice as many when measured again; looks at a
    suspect, of which `agree` must find it suspect again."""

    relative: float = 0.05
    absolute_s: float = 0.2e-6
    rounds: int = 9
    confirmations: int = 5
    agree: int = 3
    confidence: float = 0.8  # of an interval; the looks that must agree make up for the rest


@dataclass(frozen=True)
class Change:
    """Of one case, head against base: ratios of times, above 1 is slower."""

    case: str
    base_s: float
    head_s: float
    ratio: float
    low: float
    high: float
    noise: float  # base against itself: how far the median ratio is from 1
    suspect: bool
    slower: bool  # by the median alone
    faster: bool
    looks: int = 1
    loss: bool = False


def look(case: str, sides: Mapping[str, Side], limits: Limits, rounds: int) -> Change:
    """Measures a case on "base", "again" (base once more) and "head"."""
    seen = interleave({name: lambda side=side: side.seconds(case) for name, side in sides.items()}, rounds)
    both = [(a * b) ** 0.5 for a, b in zip(seen["base"], seen["again"], strict=True)]
    changes = [head / base for head, base in zip(seen["head"], both, strict=True)]
    noise = [a / b for a, b in zip(seen["again"], seen["base"], strict=True)]
    far = abs(Summary.of(noise).median - 1.0)
    ratio, (low, high) = Summary.of(changes).median, median_interval(changes, limits.confidence)
    base_s, head_s = Summary.of(both).median, Summary.of(seen["head"]).median
    matters = abs(head_s - base_s) >= limits.absolute_s
    slower = matters and ratio >= 1 + limits.relative
    return Change(
        case, base_s, head_s, ratio, low, high, far,
        suspect=slower and low > 1 + far, slower=slower,
        faster=matters and ratio <= 1 / (1 + limits.relative) and high < 1 - far,
    )  # fmt: skip


def compare(
    cases: Sequence[str],
    sides: Mapping[str, Side],
    fresh: Callable[[], Mapping[str, Side]],
    limits: Limits,
    progress: Callable[[Change], Change] = lambda change: change,
) -> list[Change]:
    """One Change per case, the last look at it. `fresh` starts new sides for another look."""
    found = {case: progress(look(case, sides, limits, limits.rounds)) for case in cases}
    agreed = {case: 0 for case in cases if found[case].slower}
    for number in range(limits.confirmations):
        left = limits.confirmations - number
        open_still = [case for case, times in agreed.items() if 0 < limits.agree - times <= left]
        if not open_still:
            break
        sides = fresh()
        for case in open_still:
            again = look(case, sides, limits, 2 * limits.rounds)
            agreed[case] += again.suspect
            loss = agreed[case] >= limits.agree
            found[case] = Change(**(vars(again) | {"looks": number + 2, "loss": loss}))
    return list(found.values())


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
