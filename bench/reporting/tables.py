"""Tables of each suite: columns and cells as text, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..decode import summary


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One JSON file: where it was measured, tables, plots."""

    title: str
    about: str
    tables: Sequence[Table]
    plots: Sequence[Path] = field(default_factory=list)


def section(name: str, document: dict[str, Any], plots: Sequence[Path] = ()) -> Section:
    make = SUITES.get(document["suite"], _any)
    return Section(name, about(document), make(document), list(plots))


def about(document: dict[str, Any]) -> str:
    """The machine, the versions, the ceilings, in one line."""
    env = document["environment"]
    packages = env.get("packages", {})
    parts = [f"suite {document['suite']}", f"{env.get('cpu', '?')}, {env.get('cores', '?')} cores"]
    native = env.get("native", {})
    if native.get("simd"):
        parts.append(f"SIMD {native['simd']}")
    parts += [f"{name} {packages[name]}" for name in ("memory3", "torch", "faiss-cpu") if packages.get(name)]
    best = document.get("ceilings", ())
    if isinstance(best, dict):  # of a GPU
        parts.append(
            f"{env['gpu']['name']}: reads {best['read_gb_s']:.0f} GB/s, copies {best['copy_gb_s']:.0f} GB/s, matrix "
            f"products {best['matmul_tflops']:.0f} TFLOP/s"
        )
        best = ()
    for top in best:
        parts.append(
            f"{top['threads']} thread(s): reads {top['read_gb_s']:.1f} GB/s, products {top['dot_gflop_s']:.0f} GFLOP/s"
        )
    return "; ".join(parts)


def _run(document: dict[str, Any]) -> list[Table]:
    rows = []
    for r in document["rows"]:
        ratios = "; ".join(f"{ratio:.2f}x {peer}" for peer, ratio in r["peer_ratios"].items())
        if r["kind"] == "peer":
            ratios = "(peer)"
        rows.append(
            (
                f"{r['op']} {r['case']}", f"{r['backend']}, {r['state']}, {r['threads']}t", f"{r['ms']:.4g}",
                f"{r['ms_p20']:.4g}-{r['ms_p80']:.4g}", f"{r['gb_per_s']:.1f}", f"{r['read_share']:.0%}",
                f"{r['gflop_per_s']:.1f}", f"{r['dot_share']:.0%}", ratios,
            )
        )  # fmt: skip
    columns = ("case", "backend", "ms", "p20-p80", "GB/s", "of reads", "GFLOP/s", "of products", "times as fast as")
    found = [Table("Ops", columns, rows)]
    if document.get("dispatch"):
        lines = [(d["op"], f"{d['us']:.2f}", f"{d['us_low']:.2f}") for d in document["dispatch"]]
        found.append(Table("A call with nothing to do", ("op", "us", "least"), lines))
    return found


def _gpu(document: dict[str, Any]) -> list[Table]:
    timed = [r for r in document["rows"] if r.get("cold_us")]
    lines = [
        (
            f"{r['op']}, {r['shape']}", r["backend"], f"{r['cold_us']:,.1f}", f"{r['hot_us']:,.1f}",
            f"{r['predicted_us']:,.1f}" if "predicted_us" in r else "", f"{r['gb_per_s']:,.0f}",
            f"{r['bandwidth_share']:.0%}", f"{r['tflop_per_s']:.1f}", f"{r['rate_share']:.0%}",
        )
        for r in timed
    ]  # fmt: skip
    columns = ("op, shape", "backend", "cold us", "hot us", "predicted us", "GB/s", "of reads", "TFLOP/s", "of matmul")
    steps = [(s["name"], s["verdict"], f"{s['seconds']:.0f}", s["detail"]) for s in document.get("steps", ())]
    return [Table("Steps", ("step", "verdict", "seconds", ""), steps), Table("Ops", columns, lines)]


def _decode(document: dict[str, Any]) -> list[Table]:
    rows, found = document["rows"], []
    for key in dict.fromkeys(r["setting"] for r in rows):
        lines = []
        for r in (r for r in rows if r["setting"] == key):
            low, high = r["tokens_per_s_interval"]
            ratio, guess = r["ratios"].get("none"), r["predicted_ratios"].get("none")
            lines.append(
                (
                    r["arm"], f"{r['tokens_per_s']:.1f} ({low:.1f}-{high:.1f})",
                    f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})" if ratio else "",
                    f"{guess:.3f}" if guess else "", f"{r['wall_s']:.2f}",
                    f"{r['ttft_s_p50'] * 1e3:.0f} / {r['ttft_s_p90'] * 1e3:.0f}",
                    mib(r["kv_bytes"]), mib(r["bytes_per_chunk"]), mib(r["device_bytes"]), mib(r["peak_rss_bytes"]),
                )
            )  # fmt: skip
        columns = ("arm", "tokens/s (95 %)", "to none (95 %)", "predicted", "total s", "first ms p50 / p90",
                   "KV MiB each", "loaded MiB/chunk", "from device MiB", "peak RSS MiB")  # fmt: skip
        found.append(Table(f"{key}; {next(r['runs'] for r in rows if r['setting'] == key)} rounds", columns, lines))
        found.append(_stages(key, [r for r in rows if r["setting"] == key]))
    lines = [
        (
            g["what"], g["setting"], f"{g['least']:.2f}", f"{g['ratio']:.3f} ({g['low']:.3f}-{g['high']:.3f})",
            f"{g['predicted']:.3f}" if g["predicted"] else "", "met" if g["met"] else "missed",
        )
        for g in summary.gates(rows)
    ]  # fmt: skip
    found.append(Table("Gates and expectations", ("what", "setting", "least", "median (95 %)", "predicted", ""), lines))
    lines = [
        (
            f"{b['arm']} against {b['against']}", b["setting"], f"{b['write_s'] * 1e3:.1f}", f"{b['read_s'] * 1e3:.2f}",
            f"{b['text_s'] * 1e3:.2f}", f"{b['uses']:.2f}",
        )
        for b in summary.break_evens(rows, document.get("about", {}))
    ]  # fmt: skip
    columns = ("formats", "setting", "write ms", "a use ms", "a use as text ms", "pays from uses")
    found.append(Table("Break-even of one reference, measured", columns, lines))
    return found


def _stages(key: str, rows: list[dict]) -> Table:
    names = sorted({s for r in rows for s in r["stages"]}, key=lambda s: -max(r["stages"].get(s, 0) for r in rows))
    lines = [(r["arm"], *(f"{r['stages'].get(s, 0) * 1e3:.0f}" for s in names)) for r in rows]
    return Table(f"{key}: milliseconds by stage", ("arm", *names), lines)


def _growth(document: dict[str, Any]) -> list[Table]:
    found = []
    for part, curve in dict.fromkeys((r["part"], r["curve"]) for r in document["rows"]):
        points = [r for r in document["rows"] if (r["part"], r["curve"]) == (part, curve)]
        names = list(dict.fromkeys(n for r in points for n in r["values"]))
        lines = [
            (f"{r['x']:,}", *(f"{r['values'][n]:.4g}" if n in r["values"] else "" for n in names))
            for r in sorted(points, key=lambda r: r["x"])
        ]
        found.append(Table(f"{part}: {curve}", (points[0]["axis"], *names), lines))
    lines = [
        (f"{e['part']}: {e['curve']}", e["quantity"], f"{e['exponent']:.2f}", f"{e['last']:.2f}")
        for e in document.get("exponents", ())
    ]
    return [*found, Table("Exponents", ("curve", "quantity", "overall", "between the last two"), lines)]


def _self_test(document: dict[str, Any]) -> list[Table]:
    (r,) = document["rows"]
    lines = [
        ("comparisons of a tree with itself", f"{r['comparisons']}"),
        ("false alarms", f"{r['false_alarms']}"),
        ("planted slowdowns", f"{r['planted']} of {r['planted_slowdown']:.0%}"),
        ("found", f"{r['detected']}"),
    ]
    return [Table("The gate's own test", ("", ""), lines)]


def _any(document: dict[str, Any]) -> list[Table]:
    """Numbers and texts of rows that have no table of their own."""
    rows = document["rows"]
    names = [n for n in (rows[0] if rows else ()) if isinstance(rows[0][n], (int, float, str))]
    lines = [[_cell(r.get(n)) for n in names] for r in rows]
    return [Table(document["suite"], [n.replace("_", " ") for n in names], lines)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.2f}" if count < 100 * 2**20 else f"{count / 2**20:.0f}"


SUITES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "run": _run, "decode": _decode, "growth": _growth, "compare self-test": _self_test,
    "gpu-check": _gpu,
}  # fmt: skip
