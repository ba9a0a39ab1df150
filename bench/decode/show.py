"""The decode tables on a terminal."""

from __future__ import annotations

from ..report import mebibytes, show_table


def show(rows: list[dict]) -> None:
    """Speeds, then milliseconds by stage, one pair of tables per setting."""
    for key in dict.fromkeys(r["setting"] for r in rows):
        mine = [r for r in rows if r["setting"] == key]
        columns = ("arm", "tokens/s", "95 %", "to none", "95 %", "predicted", "total", "first p50", "p90", "KV each",
                   "loaded/chunk", "from device", "peak RSS")  # fmt: skip
        show_table(f"{key}; medians of {mine[0]['runs']} rounds", columns, [_line(r) for r in mine])
        names = sorted({s for r in mine for s in r["stages"]}, key=lambda s: -max(r["stages"].get(s, 0) for r in mine))
        stages = [(r["arm"], *(f"{r['stages'].get(s, 0) * 1000:.0f}" for s in names)) for r in mine]
        show_table("milliseconds by stage", ("arm", *names), stages)


def _line(r: dict) -> tuple[str, ...]:
    low, high = r["tokens_per_s_interval"]
    ratio = r["ratios"].get("none")
    guess = r["predicted_ratios"].get("none")
    return (
        r["arm"],
        f"{r['tokens_per_s']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{ratio[0]:.3f}" if ratio else "",
        f"{ratio[1]:.3f}-{ratio[2]:.3f}" if ratio else "",
        f"{guess:.3f}" if guess else "",
        f"{r['wall_s']:.2f} s",
        f"{r['ttft_s_p50'] * 1000:.0f} ms",
        f"{r['ttft_s_p90'] * 1000:.0f} ms",
        mebibytes(r["kv_bytes"]),
        mebibytes(r["bytes_per_chunk"]),
        mebibytes(r["device_bytes"]),
        mebibytes(r["peak_rss_bytes"]) if r["peak_rss_bytes"] else "",
    )


def show_gates(found: list[dict]) -> None:
    lines = [
        (
            f"{g['what']}  [{g['setting']}]",
            "gate" if g["must"] else "expected",
            f"{g['least']:.2f}",
            f"{g['ratio']:.3f}",
            f"{g['low']:.3f}-{g['high']:.3f}",
            f"{g['predicted']:.3f}" if g["predicted"] else "",
            "met" if g["met"] else "missed",
        )
        for g in found
    ]
    show_table("ratios of throughputs", ("what", "kind", "least", "median", "95 %", "predicted", ""), lines)


def show_break_evens(found: list[dict]) -> None:
    lines = [
        (
            f"{b['arm']} against {b['against']}  [{b['setting']}]",
            f"{b['write_s'] * 1000:.1f} ms",
            f"{b['read_s'] * 1000:.2f} ms",
            f"{b['text_s'] * 1000:.2f} ms",
            f"{b['uses']:.2f}",
        )
        for b in found
    ]
    show_table("one reference, measured", ("formats", "write", "a use", "a use as text", "pays from uses"), lines)
