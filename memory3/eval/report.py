"""From single answers to the table: means, paired bootstrap intervals, the share of the gap that memory closes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def table(results: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row per set and arm: n, nll (nats per answer token) with its interval, gold (share of questions that read
    their answer's reference), and em, f1 over `spoken` answers in words (None without any)."""
    rows = []
    for name, arm in dict.fromkeys((r["set"], r["arm"]) for r in results):
        part = [r for r in results if r["set"] == name and r["arm"] == arm]
        loss, tokens = _columns(part)
        draws = _draws(len(part), seed)
        spoken = [r for r in part if "em" in r]
        rows.append(
            {
                "set": name, "arm": arm, "n": len(part), "nll": float(loss.sum() / tokens.sum()),
                "nll_interval": _interval(loss[draws].sum(1) / tokens[draws].sum(1)),
                "gold": float(np.mean([r["gold"] for r in part])),
                "spoken": len(spoken),
                "em": float(np.mean([r["em"] for r in spoken])) if spoken else None,
                "f1": float(np.mean([r["f1"] for r in spoken])) if spoken else None,
            }
        )  # fmt: skip
    return rows


def difference(results: Sequence[dict[str, Any]], arm: str, other: str, seed: int = 0) -> list[dict[str, Any]]:
    """Relative NLL difference of two arms per set, (arm - other) / other, over the questions that both answered."""
    rows = []
    for name in dict.fromkeys(r["set"] for r in results):
        ids, (a, b) = _paired(results, name, (arm, other))
        if not ids:
            continue
        draws = _draws(len(ids), seed)
        value = a[0].sum() / b[0].sum() - 1
        rows.append({"set": name, "n": len(ids), "value": float(value),
                     "interval": _interval(a[0][draws].sum(1) / b[0][draws].sum(1) - 1)})  # fmt: skip
    return rows


def gap_closed(
    results: Sequence[dict[str, Any]], memory: str, closed: str, text: str, seed: int = 0
) -> list[dict[str, Any]]:
    """(closed - memory) / (closed - text) per set, over the questions that all three answered."""
    rows = []
    for name in dict.fromkeys(r["set"] for r in results):
        ids, (m, c, t) = _paired(results, name, (memory, closed, text))
        if not ids:
            continue

        def share(pick: Any, m=m, c=c, t=t) -> Any:
            return (c[0][pick].sum(-1) - m[0][pick].sum(-1)) / (c[0][pick].sum(-1) - t[0][pick].sum(-1))

        rows.append({"set": name, "n": len(ids), "value": float(share(np.arange(len(ids)))),
                     "interval": _interval(share(_draws(len(ids), seed)))})  # fmt: skip
    return rows


def _paired(results: Sequence[dict[str, Any]], name: str, arms: Sequence[str]) -> tuple[list[str], list[Any]]:
    by = {(r["arm"], r["id"]): r for r in results if r["set"] == name}
    ids = sorted({i for a, i in by if a == arms[0]}.intersection(*({i for a, i in by if a == arm} for arm in arms[1:])))
    return ids, [_columns([by[arm, i] for i in ids]) for arm in arms]


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r["loss"] for r in rows]), np.array([r["tokens"] for r in rows])


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def _interval(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Arms down, sets across: NLL with half the width of its interval, and F1 where there is one."""
    sets = list(dict.fromkeys(r["set"] for r in rows))
    by = {(r["arm"], r["set"]): r for r in rows}
    most = {s: max(r["n"] for r in rows if r["set"] == s) for s in sets}
    lines = ["| | " + " | ".join(f"{s} (n={most[s]})" for s in sets) + " |", "|---|" + "---|" * len(sets)]
    for arm in dict.fromkeys(r["arm"] for r in rows):
        cells = [_cell(by.get((arm, s)), most[s]) for s in sets]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, most: int) -> str:
    if row is None:
        return ""
    low, high = row["nll_interval"]
    text = f"{row['nll']:.3f} ±{(high - low) / 2:.2f}"
    if row["f1"] is not None:
        text += f"; F1 {row['f1']:.2f}"
    return text + (f" (n={row['n']})" if row["n"] != most else "")


def draw(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """A PNG: NLL per arm, one panel per set, with intervals. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(r["set"] for r in rows))
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    figure, axes = plt.subplots(
        1,
        len(sets),
        figsize=(2.5 + 2 * len(sets), 1.4 + 0.24 * len(arms)),
        sharey=True,
        layout="constrained",
    )
    for axis, name in zip(np.atleast_1d(axes), sets, strict=True):
        for place, arm in enumerate(arms):
            row = next((r for r in rows if r["set"] == name and r["arm"] == arm), None)
            if row is not None:
                low, high = row["nll_interval"]
                error = [[max(0, row["nll"] - low)], [max(0, high - row["nll"])]]
                axis.barh(place, row["nll"], xerr=error, color=_colour(arm), error_kw={"lw": 0.8})
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("nats/token", fontsize=7)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(arms)), arms)
    first.set_ylim(len(arms) - 0.5, -0.5)  # the first arm on top
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _colour(arm: str) -> str:
    if "RAG" in arm or "full KV" in arm:
        return "#8a8a8a"
    if "no memory" in arm or "closed" in arm:
        return "#c9c9c9"
    return "#d98c5f" if "random" in arm or "removed" in arm else "#2f6f9f"
