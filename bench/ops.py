"""Every op's benchmark cases, from the contracts: the native kernel at each SIMD level and the PyTorch reference.

A backend is timed only after its result matched the float64 reference. Operands are warm; rounds are interleaved.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import memory3_kernels  # noqa: F401  (registers the ops)
from memory3_kernels import _load, use_backend
from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple, assert_close, widen

from . import environment
from .report import document, show_table, write_json
from .timing import Summary, interleave

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG_ENOUGH_S = 2e-3  # calls are repeated until one measurement takes this long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--runs", type=int, default=9, help="rounds, one run of each backend (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.op:
        op = OPS[name]
        dtype = DTYPES[args.dtype] if DTYPES[args.dtype] in op.dtypes else op.dtypes[0]
        for case in op.cases():
            if case.bench:
                rows += measure(op, case, dtype, args.runs)
    show(rows, args.threads)
    if args.json:
        settings = {"runs": args.runs, "threads": args.threads}
        write_json(args.json, document("ops", settings, environment.describe(), rows))
    return 0


@contextmanager
def backend(name: str) -> Iterator[None]:
    """ "reference", or "native-<level>"."""
    kind, _, level = name.partition("-")
    with use_backend(kind):
        if level:
            with _load.use_simd_level(level):
                yield
        else:
            yield


def measure(op, case, dtype: torch.dtype, runs: int) -> list[dict[str, Any]]:
    """One row per backend. Raises AssertionError, before any timing, where a backend's result is wrong."""
    args, kwargs = case.make(dtype, torch.Generator().manual_seed(zlib.crc32(case.id.encode())))
    names = ["reference", *(f"native-{level}" for level in _load.available_simd_levels())]
    for name in names:
        gate(op, name, args, kwargs, op.tolerance[dtype])
    arms = {name: timer(op, name, args, kwargs) for name in names}
    cost = op.cost(*args, **kwargs)
    seen = {name: Summary.of(values) for name, values in interleave(arms, runs).items()}
    return [
        {
            "op": op.name,
            "case": case.id,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": name,
            "ms": summary.median * 1e3,
            "ms_low": summary.low * 1e3,
            "ms_high": summary.high * 1e3,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "gb_per_s": cost.bytes / summary.median / 1e9,
            "gflop_per_s": cost.flops / summary.median / 1e9,
            "ratio": seen["reference"].median / summary.median,
        }
        for name, summary in seen.items()
    ]


def gate(op, name: str, args: tuple, kwargs: dict, tolerance: float) -> None:
    """Compares one call with the reference in float64 (mutated arguments are restored)."""
    before = {i: args[i].clone() for i in op.mutates}
    with backend(name):
        actual = as_tuple(op(*args, **kwargs)) + tuple(args[i].clone() for i in op.mutates)
    for i, value in before.items():
        args[i].copy_(value)
    wide = tuple(widen(a) for a in args)
    expected = as_tuple(op.reference(*wide, **widen(kwargs))) + tuple(wide[i] for i in op.mutates)
    for i, value in before.items():
        args[i].copy_(value)
    if op.compare is not None:
        return op.compare(actual, expected, args, kwargs, tolerance)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, tolerance, f"{op.name} on {name}, output {i}")


def timer(op, name: str, args: tuple, kwargs: dict) -> Callable[[], float]:
    """Seconds of one call: the mean over enough calls to be measurable."""

    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            op(*args, **kwargs)
        return (time.perf_counter() - begin) / calls

    with backend(name):
        calls = max(1, int(LONG_ENOUGH_S / max(seconds(2), 1e-7)))

    def once() -> float:
        with backend(name), torch.no_grad():
            return seconds(calls)

    return once


def show(rows: list[dict[str, Any]], threads: int) -> None:
    shown, last = [], None
    for row in rows:
        key = (row["op"], row["case"])
        shown.append(
            [
                f"{row['op']}  {row['case']}  {row['dtype']}" if key != last else "",
                row["backend"],
                f"{row['ms']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['gflop_per_s']:.1f}",
                f"{row['ratio']:.1f}x",
            ]
        )
        last = key
    title = f"ops, {threads} thread(s), warm operands, medians; load {environment.load_average():.1f}"
    show_table(title, ["op, case, dtype", "backend", "ms", "GB/s", "GFLOP/s", "to reference"], shown)
