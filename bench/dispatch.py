"""What a call costs before any work: every op of the registry on its emptiest case, from Python.

The calls of all ops take turns, in bursts of CALLS; the medians are over rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

import memory3_kernels  # noqa: F401  (registers the ops)
from memory3_kernels._registry import OPS, Case, Op

from . import environment
from .measure import operands
from .report import document, show_table, write_json
from .timing import Summary

CALLS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all records here")
    parser.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    parser.add_argument("--rounds", type=int, default=25, help="bursts of each op (default: 25)")


def main(args: argparse.Namespace) -> int:
    rows = measure([OPS[name] for name in args.op], torch.bfloat16, args.rounds)
    show(rows)
    if args.json:
        write_json(args.json, document("dispatch", {"rounds": args.rounds}, environment.describe(), rows))
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    shown = [[row["op"], row["case"], f"{row['us']:.1f}", f"{row['us_low']:.1f}"] for row in rows]
    show_table("a call with nothing to do, from Python", ("op", "case", "us", "least"), shown)


def emptiest(op: Op, dtype: torch.dtype) -> Case:
    """The case with the least work by the op's own count."""

    def work(case: Case) -> tuple[int, int]:
        args, kwargs = operands(case, dtype)
        cost = op.cost(*args, **kwargs)
        return cost.flops, cost.bytes

    return min((case for case in op.cases() if not case.slow), key=work)


def complete(op: Op, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The arguments of the same call as the op's public function makes it: nothing left out, all by position."""
    given = dict(zip(op.names, args, strict=False)) | kwargs
    return tuple(given.get(name, default) for name, default in zip(op.names, op.defaults, strict=True))


def measure(ops: Sequence[Op], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Microseconds per call, median over rounds in which the ops take turns."""
    calls = {}
    for op in ops:
        of = dtype if dtype in op.dtypes else op.dtypes[0]
        case = emptiest(op, of)
        calls[op.name] = (op, case.id, complete(op, *operands(case, of)))
    seen: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, (op, _, args) in calls.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    op(*args)
                seen[name].append((time.perf_counter() - begin) / CALLS)
    return [
        {"op": name, "case": calls[name][1], "us": Summary.of(values[1:]).median * 1e6, "us_low": min(values[1:]) * 1e6}
        for name, values in seen.items()
    ]
