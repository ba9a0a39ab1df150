"""The report of gpu-check for people."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "op, shape", "backend", "cold us", "hot us", "predicted us", "floors us", "GB/s", "of reads", "TFLOP/s",
    "of matmul", "note",
)  # fmt: skip


def _number(row: dict, key: str, form: str = ".1f") -> str:
    return format(row[key], form) if row.get(key) is not None else ""


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _op_row(row: dict[str, Any]) -> str:
    floors = f"{row['memory_us']:.1f} / {row['compute_us']:.1f}" if "memory_us" in row else ""
    note = row["reason"] or ("" if row["captured"] else "not captured: host time included")
    return _line((
        f"`{row['op']}`, {row['shape']}", row["backend"], _number(row, "cold_us"), _number(row, "hot_us"),
        _number(row, "predicted_us"), floors, _number(row, "gb_per_s", ".0f"), _number(row, "bandwidth_share", ".0%"),
        _number(row, "tflop_per_s"), _number(row, "rate_share", ".0%"), note.replace("|", "/"),
    ))  # fmt: skip


def _decode(rows: list[dict[str, Any]]) -> list[str]:
    """One line per shape, batch and context: without memories, with them, and what they cost."""
    heads = ("shape", "batch", "context", "without us", "with us", "memories us", "predicted us", "of reads")
    lines = [_line(heads), _line(("---",) * len(heads))]
    at = {(r["shape"], r["batch"], r["context"], bool(r["refs"])): r for r in rows}
    for shape, batch, context in dict.fromkeys(key[:3] for key in at if key[3]):
        plain, full = at[shape, batch, context, False], at[shape, batch, context, True]
        cost = (
            _number({"d": full["cold_us"] - plain["cold_us"]}, "d") if not (plain["reason"] or full["reason"]) else ""
        )
        lines.append(_line((
            shape, str(batch), str(context), _number(plain, "cold_us"), _number(full, "cold_us"), cost,
            _number(full, "predicted_us"), _number(full, "bandwidth_share", ".0%"),
        )))  # fmt: skip
    return lines


def render(report: dict[str, Any]) -> str:
    """Markdown: the machine, the steps, the ops, the decode table."""
    gpu, packages = report["environment"]["gpu"], report["environment"]["packages"]
    lines = [
        f"# {gpu['name']}",
        "",
        f"Compute capability {gpu['capability']}, {gpu['sms']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB; torch "
        f"{packages['torch']}, CUDA {gpu['cuda_of_torch']}; kernels built for {gpu['archs'] or 'nothing'}: "
        f"{gpu['cuda_kernels']}.",
    ]
    if "ceilings" in report:
        best = report["ceilings"]
        lines += ["", f"Best of this GPU, measured in the same run: reads {best['read_gb_s']:.0f} GB/s, copies "
                  f"{best['copy_gb_s']:.0f} GB/s (read and written), bf16 matrix products {best['matmul_tflops']:.0f} "
                  "TFLOP/s. Shares below are of the first and the last."]  # fmt: skip
    if report["data_sheet"] is None:
        lines += ["", "No data sheet of this device is known (bench/gpu/devices.py): there are no predictions."]
    if report["steps"]:
        lines += ["", "| step | verdict | seconds | |", "|---|---|---|---|"]
        lines += [
            _line((s["name"], s["verdict"], f"{s['seconds']:.0f}", s["detail"].replace("|", "/")[:400]))
            for s in report["steps"]
        ]
    if report["rows"]:
        lines += [
            "",
            "Medians; cold: operands from memory, hot: as the caches have them. Floors: memory / compute.",
            "",
        ]
        lines += [_line(COLUMNS), _line(("---",) * len(COLUMNS)), *map(_op_row, report["rows"])]
    if report["decode"]:
        lines += [
            "",
            "## memory_decode, one layer, with the paper's memories and without",
            "",
            *_decode(report["decode"]),
        ]
    return "\n".join(lines) + "\n"
