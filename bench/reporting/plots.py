"""Plots of a results file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

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
    elif suite == "gpu-check":
        timed = [r for r in rows if r.get("cold_us")]
        if mine := [r for r in timed if r["backend"] in ("cuda", "triton") and r["flops"]]:
            yield "roofline", gpu_roofline(mine, document["ceilings"])
        if compared := gpu_ratios(timed):
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


def gpu_roofline(rows: list[dict], best: dict[str, float]) -> Figure:
    """The same for a GPU: cold operands, the paper's shape and larger ones; filled: CUDA, open: Triton."""
    figure, (axis,) = _axes(9, 5.4)
    reads, products = best["read_gb_s"] / 1e3, best["matmul_tflops"]  # TB/s, TFLOP/s
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 2, max(max(intensity) * 2, 4 * products / reads)
    axis.plot([low, products / reads, high], [low * reads, products, products], color="black")
    ops = list(dict.fromkeys(r["op"] for r in rows))
    for row, x in zip(rows, intensity, strict=True):
        edge = colour(ops.index(row["op"]))
        axis.scatter(x, row["tflop_per_s"], s=34, color=edge if row["backend"] == "cuda" else "white", edgecolor=edge,
                     zorder=3)  # fmt: skip
    for number, op in enumerate(ops):
        axis.scatter([], [], color=colour(number), label=op, s=34)
    title = f"Roofline: reads {1e3 * reads:.0f} GB/s, products {products:.0f} TFLOP/s; filled: CUDA, open: Triton"
    label = "operations per byte of compulsory traffic"
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="TFLOP/s", title=title)
    axis.legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def gpu_ratios(rows: list[dict]) -> list[dict]:
    """Rows for `peers`: the CUDA kernel against everything else at its shape, cold."""
    rows = [r for r in rows if r.get("cold_us")]
    mine = {(r["op"], r["shape"]): r["cold_us"] for r in rows if r["backend"] == "cuda"}
    return [
        {"op": r["op"], "case": r["shape"], "state": "cold", "threads": None, "peer": r["backend"],
         "peer_ratio": r["cold_us"] / mine[r["op"], r["shape"]]}
        for r in rows
        if r["backend"] not in ("cuda", "reference") and (r["op"], r["shape"]) in mine
    ]  # fmt: skip


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def peers(rows: list[dict]) -> Figure:
    """How many times as fast as each op's first peer, by case; 1 is equal."""
    labels = [f"{r['op']}  {r['case']}  {r['state']}{_threads(r)}   vs {r['peer']}" for r in rows]
    figure, (axis,) = _axes(10, 0.9 + 0.24 * len(rows))
    values = [r["peer_ratio"] for r in rows]
    # From 1 on: what is slower than its peer goes to the left.
    widths, colours = [v - 1 for v in values], [OWN if v >= 1 else COLOURS[1] for v in values]
    axis.barh(labels, widths, left=1.0, color=colours, height=0.7)
    for at, value in enumerate(values):
        side = "left" if value >= 1 else "right"
        axis.annotate(f" {value:.2f} ", (value, at), va="center", ha=side, fontsize=7)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xscale="log", xlabel="times as fast as the peer", title="Against other libraries, median of rounds")
    axis.set_xlim(min(0.5, 0.8 * min(values)), max(2.0, 1.25 * max(values)))
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(FuncFormatter(lambda x, _: f"{x:g}"))
    return figure


def _threads(row: dict) -> str:
    return f", {row['threads']}t" if row["threads"] else ""


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
