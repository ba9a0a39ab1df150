"""Microbenchmarks of the ops, from their contracts: times, bytes, shares of the machine's ceilings, peers side by side.

A result is compared with the float64 reference before anything is timed. Operands are hot (the same at every call) or
cold (1 GiB of copies in turn). Reads and multiply-adds at the machine's best are measured in the same run.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import memory3_kernels  # noqa: F401  (registers the ops)
from memory3_kernels import _load
from memory3_kernels._registry import OPS, Case, Op

from . import ceilings, dispatch, environment, measure
from .report import document, show_table, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUITES = {
    "smoke": {"rounds": 3, "states": ("hot",), "threads": (1,)},  # one case of each op: does it all still run?
    "cpu": {"rounds": 9, "states": measure.STATES, "threads": (1, 2)},
    "gpu": {"rounds": 30, "states": measure.STATES, "threads": (1,)},  # everything `gpu-check` measures
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="smoke: one case per op, hot; gpu: gpu-check")
    parser.add_argument("--json", metavar="FILE", help="write all records here")
    parser.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--levels", nargs="+", metavar="LEVEL", help="SIMD levels, or `all` (default: the best)")
    parser.add_argument("--threads", type=int, nargs="+", help="threads of torch (default: the suite's)")
    parser.add_argument("--states", nargs="+", choices=measure.STATES, help="default: the suite's")
    parser.add_argument("--rounds", type=int, help="rounds, one run of each arm (default: the suite's)")
    parser.add_argument("--no-reference", action="store_true", help="do not time the PyTorch reference")


def main(args: argparse.Namespace) -> int:
    if args.suite == "gpu":
        return on_gpu(args)
    settings = {
        "suite": args.suite,
        "dtype": args.dtype,
        "rounds": args.rounds or SUITES[args.suite]["rounds"],
        "states": list(args.states or SUITES[args.suite]["states"]),
        "threads": list(args.threads or SUITES[args.suite]["threads"]),
        "levels": levels(args.levels),
        "cold_bytes": measure.COLD_BYTES,
    }
    work = [(op, case) for op in (OPS[name] for name in args.op) for case in cases(op, args.suite, args.case)]
    if not work:
        raise SystemExit(f"--case: expected part of a benchmark case's name, got {args.case!r}; see --help")
    rows: list[dict[str, Any]] = []
    tops = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("ceilings", total=len(work) * len(settings["threads"]))
        for count in settings["threads"]:
            tops.append(ceilings.measure(count))
            for op, case in work:
                progress.update(task, description=f"{op.name}  {case.id}")
                rows += measure.measure(
                    op, case, dtype_of(op, args.dtype), levels=settings["levels"], states=settings["states"],
                    rounds=settings["rounds"], ceilings=tops[-1],
                    reference=not args.no_reference and count == settings["threads"][0],
                )  # fmt: skip
                progress.advance(task)
        progress.update(task, description="dispatch")
        empty = dispatch.measure([OPS[name] for name in args.op], DTYPES[args.dtype], settings["rounds"])
    for top in tops:
        show(rows, top)
    dispatch.show(empty)
    if args.json:
        more = {"ceilings": [asdict(top) for top in tops], "dispatch": empty}
        write_json(args.json, document("run", settings, environment.describe(), rows, **more))
    return 0


def on_gpu(args: argparse.Namespace) -> int:
    """`gpu-check` with this command's options; status 2 without a GPU."""
    from .gpu import check

    line = argparse.ArgumentParser()
    check.add_arguments(line)
    asked = line.parse_args([])
    asked.rounds = args.rounds or SUITES["gpu"]["rounds"]
    asked.op = [op for op in asked.op if op in args.op]
    if args.json:
        asked.out = Path(args.json).with_suffix("")
    return check.main(asked)


def levels(asked: list[str] | None) -> list[str]:
    """Raises SystemExit for a level this machine lacks."""
    there = _load.available_simd_levels()
    if not there:
        raise SystemExit(f"bench run: there is no native library to time ({_load.native_reason()})")
    if asked == ["all"]:
        return there
    for level in asked or ():
        if level not in there:
            raise SystemExit(f"--levels: expected `all` or some of {', '.join(there)}, got {level!r}")
    return asked or there[-1:]


def cases(op: Op, suite: str, part: str) -> list[Case]:
    found = [case for case in op.cases() if case.bench and part in case.id]
    return found[:1] if suite == "smoke" else found


def dtype_of(op: Op, name: str) -> torch.dtype:
    return DTYPES[name] if DTYPES[name] in op.dtypes else op.dtypes[0]


def show(rows: list[dict[str, Any]], top: ceilings.Ceilings) -> None:
    shown: list[list[str]] = []
    last = None
    for row in (r for r in rows if r["threads"] == top.threads):
        if (row["op"], row["case"]) != last:
            last = row["op"], row["case"]
            shown.append([f"{row['op']}  {row['case']}  {row['dtype']}"])
        beside = row["peer_ratios"].items() if row["kind"] == "op" else ()
        shown.append(
            [
                f"  {row['backend']}, {row['state']}",
                milliseconds(row["ms"]),
                f"{row['gb_per_s']:.1f}",
                f"{row['read_share']:.0%}",
                f"{row['gflop_per_s']:.1f}",
                f"{row['dot_share']:.0%}",
                "  ".join(f"{ratio:.1f}x {name}" for name, ratio in beside),
            ]
        )
    title = (
        f"{top.threads} thread(s), medians of {rows[0]['rounds']} rounds; ceilings: reads {top.read_gb_s:.1f} GB/s, "
        f"products of bf16 pairs {top.dot_gflop_s:.0f} GFLOP/s, copies {top.copy_gb_s:.1f} GB/s, matrix products "
        f"{top.matmul_gflop_s:.0f} GFLOP/s; load {environment.load_average():.1f}"
    )
    show_table(title, ("op, case, dtype", "ms", "GB/s", "reads", "GFLOP/s", "products", "times as fast as"), shown)


def milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"
