"""How times grow with context, batch, memories and the size of a bank: curves, and the exponents they follow.

An exponent is the slope in a log-log plot, by least squares over all points and between the last two: 1 is
proportional, 0 does not grow. Parts:
  ops      memory_decode on made-up operands: context 256 to 16k, batch 1 to 64, 1 to 32 memories
  engine   a decode step and a prompt of SmolLM2-135M: context 256 to 8k, batch 1 to 64, 1 to 32 memories
  bank     1,000 to a million references as vector-quantised records: writing, searching, loading, bytes on disk. Codes
           and embeddings are made up (uniform bytes; a mixture of Gaussians): encoding a million texts would take days
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import environment
from ..measure import threads
from ..report import SCHEMA, document, show_table, write_json
from . import banks, curves
from .exponent import exponents

PARTS: dict[str, Callable[..., Any]] = {"ops": curves.ops, "engine": curves.engine, "bank": banks.bank}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers here, and keep the parts that are there")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--runs", type=int, default=9, help="measurements per point (default 9)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(banks.SIZES),
        help="references in the bank, ascending (default: powers of ten from 1000 to 1000000)",
    )
    parser.add_argument("--folder", metavar="DIR", type=Path, help="keep the made-up bank here (default: temporary)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point later than this")


def main(args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    before: list[dict[str, Any]] = []
    if args.json and Path(args.json).is_file():
        read = json.loads(Path(args.json).read_text(encoding="utf-8"))
        if (read.get("suite"), read.get("schema")) != ("growth", SCHEMA):
            raise SystemExit(f"{args.json}: expected results of bench growth; choose another file")
        before = read["rows"]
    rows = list(before)
    with threads(args.threads), tempfile.TemporaryDirectory(prefix="memory3-growth-") as folder:
        for part in args.part:
            have = {(r["part"], r["curve"], r["x"]) for r in rows}
            for row in PARTS[part](args, args.folder or Path(folder), have, end):
                rows.append({"part": part, "threads": args.threads, **row})
                if args.json:
                    settings = {"threads": args.threads, "runs": args.runs}
                    doc = document("growth", settings, environment.describe(), rows, exponents=slopes(rows))
                    write_json(args.json, doc)
    show(rows)
    return 0


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One per part, curve and measured quantity that has at least two points."""
    found = []
    for part, curve in dict.fromkeys((r["part"], r["curve"]) for r in rows):
        points = sorted((r for r in rows if (r["part"], r["curve"]) == (part, curve)), key=lambda r: r["x"])
        for name in dict.fromkeys(n for r in points for n in r["values"]):
            line = [(r["x"], r["values"][name]) for r in points if r["values"].get(name)]
            if len(line) > 1:
                overall, last = exponents(line)
                found.append({"part": part, "curve": curve, "quantity": name, "exponent": overall, "last": last})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for part, curve in dict.fromkeys((r["part"], r["curve"]) for r in rows):
        points = sorted((r for r in rows if (r["part"], r["curve"]) == (part, curve)), key=lambda r: r["x"])
        names = list(dict.fromkeys(n for r in points for n in r["values"]))
        lines = [(f"{r['x']:,}", *(_number(r["values"].get(n)) for n in names)) for r in points]
        show_table(f"{part}: {curve}", (points[0]["axis"], *names), lines)
    lines = [
        (f"{s['part']}: {s['curve']}", s["quantity"], f"{s['exponent']:.2f}", f"{s['last']:.2f}") for s in slopes(rows)
    ]
    show_table("exponents", ("curve", "quantity", "overall", "between the last two"), lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
