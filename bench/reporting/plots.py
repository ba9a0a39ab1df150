"""Plots of a results file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#1f5f8b", "#d1603d", "#5b8c5a", "#8d6a9f", "#c7a027", "#4c9f9f", "#94524a", "#6b7a8f", "#a2a23c")
OWN, OTHER = COLOURS[0], "#9aa5b1"


def of(document: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) for what this suite shows; nothing for a suite of tables only."""
    suite, rows = document["suite"], document["rows"]
    if suite == "run":
        for top in document.get("ceilings", ()):
            mine = [r for r in rows if r["threads"] == top["threads"] and r["kind"] == "op"]
            if points := [r for r in mine if r["flops"] and r["backend"] != "reference"]:
                yield f"roofline-{top['threads']}", roofline(points, top)
        if compared := [r for r in rows if r["kind"] == "op" and r["peer_ratio"]]:
            yield "peers", peers(compared)
    elif suite == "decode" and rows:
        yield "speed", speeds(rows)
    elif suite == "growth" and rows:
        for part in dict.fromkeys(r["part"] for r in rows):
            yield f"growth-{part}", growth([r for r in rows if r["part"] == part], part)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


def _axes(width: float, height: float, count: int = 1, columns: int = 1):
    lines = -(-count // columns)
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for one in axes[count:]:
        one.set_visible(False)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, which="major", linewidth=0.4, alpha=0.5)
        one.set_axisbelow(True)
    return figure, axes[:count]


def roofline(rows: list[dict], top: dict[str, Any]) -> Figure:
    """Operations per second over operations per byte, under the ceilings measured in the same run."""
    figure, (axis,) = _axes(9, 5.4)
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 2, max(max(intensity) * 2, 4 * top["dot_gflop_s"] / top["read_gb_s"])
    ridge = top["dot_gflop_s"] / top["read_gb_s"]
    axis.plot([low, ridge, high], [low * top["read_gb_s"], top["dot_gflop_s"], top["dot_gflop_s"]], color="black")
    axis.annotate(f"reads {top['read_gb_s']:.1f} GB/s", (low, low * top["read_gb_s"]), xytext=(6, 14),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axis.annotate(f"products {top['dot_gflop_s']:.0f} GFLOP/s", (high, top["dot_gflop_s"]), xytext=(-4, 5),
                  textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    ops = list(dict.fromkeys(r["op"] for r in rows))
    for row, x in zip(rows, intensity, strict=True):
        filled = colour(ops.index(row["op"]))
        axis.scatter(x, row["gflop_per_s"], s=34, color=filled if row["state"] == "cold" else "white",
                     edgecolor=filled, zorder=3)  # fmt: skip
    for number, op in enumerate(ops):
        axis.scatter([], [], color=colour(number), label=op, s=34)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of compulsory traffic", ylabel="GFLOP/s",
             title=f"Roofline, {top['threads']} thread(s); filled: cold operands, open: hot")  # fmt: skip
    axis.legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def peers(rows: list[dict]) -> Figure:
    """How many times as fast as each op's first peer, by case; 1 is equal."""
    labels = [f"{r['op']}  {r['case']}  {r['state']}, {r['threads']}t   vs {r['peer']}" for r in rows]
    figure, (axis,) = _axes(10, 0.9 + 0.24 * len(rows))
    values = [r["peer_ratio"] for r in rows]
    axis.barh(labels, values, color=[OWN if v >= 1 else COLOURS[1] for v in values], height=0.7)
    for at, value in enumerate(values):
        axis.annotate(f" {value:.2f}", (value, at), va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xscale="log", xlabel="times as fast as the peer", title="Against other libraries, median of rounds")
    return figure


def speeds(rows: list[dict]) -> Figure:
    """Tokens per second of every arm, one panel per setting; whiskers: 95 % intervals of the median."""
    keys = list(dict.fromkeys(r["setting"] for r in rows))
    figure, axes = _axes(11, 2.6, len(keys), 2 if len(keys) > 1 else 1)
    for axis, key in zip(axes, keys, strict=True):
        mine = [r for r in rows if r["setting"] == key]
        middles = [r["tokens_per_s"] for r in mine]
        lows, highs = zip(*(r["tokens_per_s_interval"] for r in mine), strict=True)
        error = [
            [m - x for m, x in zip(middles, lows, strict=True)],
            [x - m for m, x in zip(middles, highs, strict=True)],
        ]
        colours = [OWN if r["arm"].startswith("memory") else "#3d3d3d" if r["arm"] == "none" else OTHER for r in mine]
        axis.barh([r["arm"] for r in mine], middles, xerr=error, color=colours, height=0.7, ecolor="black", capsize=2)
        for at, value in enumerate(middles):
            axis.annotate(f" {value:.0f}", (highs[at], at), va="center", fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(key, fontsize=8)
        axis.set_xlabel("generated tokens per second, prefill included", fontsize=8)
    return figure


def growth(rows: list[dict], part: str) -> Figure:
    """Every quantity over its axis, log-log; a panel per curve, with a dotted line of slope 1."""
    curves = list(dict.fromkeys(r["curve"] for r in rows))
    panels = [(curve, group) for curve in curves for group in _groups([r for r in rows if r["curve"] == curve])]
    figure, axes = _axes(11, 3.2, len(panels), 3 if len(panels) > 1 else 1)
    for axis, (curve, names) in zip(axes, panels, strict=True):
        points = sorted((r for r in rows if r["curve"] == curve), key=lambda r: r["x"])
        for number, name in enumerate(names):
            line = [(r["x"], r["values"][name]) for r in points if r["values"].get(name)]
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour(number), label=name)
        first = next((r["x"], r["values"][names[0]]) for r in points if r["values"].get(names[0]))
        last = points[-1]["x"]
        axis.plot([first[0], last], [first[1], first[1] * last / first[0]], ":", color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=points[0]["axis"])
        axis.set_title(curve if part != "bank" else f"bank: {names[0].rsplit(' ', 1)[0]}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    return figure


def _groups(points: list[dict]) -> list[list[str]]:
    """Quantities of one unit share a panel."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(n for r in points for n in r["values"]):
        unit = next((u for u in (" ms", "recall", "/s", " s", "bytes") if u in name), name)
        found.setdefault(unit, []).append(name)
    return list(found.values())
