"""Tests, sanitizers and measurements of every GPU kernel on this machine's GPU, beside their predictions.

    python -m bench gpu-check                   writes gpu-check.json and gpu-check.md
    python -m bench gpu-check --skip tests sanitizers --op memory_decode

Exit code 0: everything passed; 1: something failed; 2: there is no GPU (nothing is written).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memory3_kernels import _cuda, doctor

from .. import environment
from ..report import document, progress, write_json
from . import ceilings, devices, measure, shapes, steps
from .clock import Clock
from .markdown import render

PARTS = ("tests", "sanitizers", "ops", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="NAME", type=Path, default=Path("gpu-check"), help="NAME.json and NAME.md")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="leave these parts out")
    parser.add_argument(
        "--op", nargs="+", choices=sorted(shapes.CALLS), default=list(shapes.CALLS), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each arm (default 30)")


def missing() -> str | None:
    """Why there is nothing to check, or None."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA: pip install torch from download.pytorch.org"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (no GPU, or no driver)"
    return None


def about() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "archs": _cuda.archs(),
        "cuda_kernels": _cuda.reason() or _cuda.device_refused(0) or "in use",
        "peers": {name: environment.version(name) for name in ("flash-attn", "flashinfer-python", "triton")},
    }


def main(args: argparse.Namespace) -> int:
    reason = missing()
    if reason is not None:
        print(f"gpu-check: {reason}. Nothing was checked.", file=sys.stderr)
        print("What is known without a GPU: python -m bench gpu-proof; predictions: python -m bench roofline.")
        return 2
    gpu = about()
    known = devices.like(gpu["name"])
    clock = Clock(gpu["l2_bytes"])
    best = ceilings.measure(clock)
    done: list[steps.Step] = []
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    about_machine = environment.describe() | {"gpu": gpu, "doctor": doctor.examine()["cuda"]["kernels"]}

    def save() -> dict[str, Any]:
        """The report as far as it is: a run that is cut off has left what it measured."""
        report = document(
            "gpu-check", {"rounds": args.rounds, "skipped": args.skip}, about_machine, rows,
            steps=[asdict(step) for step in done], decode=table, data_sheet=known and asdict(known),
            ceilings=asdict(best),
        )  # fmt: skip
        write_json(args.out.with_suffix(".json"), report)
        args.out.with_suffix(".md").write_text(render(report), encoding="utf-8")
        return report

    if "tests" not in args.skip:
        done.append(steps.tests())
        save()
    for tool in () if "sanitizers" in args.skip else steps.TOOLS:
        done.append(steps.sanitizer(tool))
        save()
    if "ops" not in args.skip:
        work = [(op, shape) for op in args.op for shape in shapes.SHAPES.values()]
        with progress("ops", len(work)) as count:
            for op, shape in work:
                rows += count(measure.measure(op, shape, clock, known, args.rounds, best=best))
                torch.cuda.empty_cache()
                save()
    if "decode" not in args.skip:
        for row in measure.decode_table(clock, known, args.rounds, best=best):
            table.append(row)
            save()
    report = save()
    print(render(report))
    return verdict(report)


def verdict(report: dict[str, Any]) -> int:
    """1 where a step failed, or a kernel of ours that should run here has no time."""
    failed = any(step["verdict"] == "failed" for step in report["steps"])
    ours = [row for row in report["rows"] + report["decode"] if row["kind"] == "op" and row["backend"] != "reference"]
    untimed = [row for row in ours if row["reason"] and "has no" not in row["reason"]]
    return 1 if failed or untimed else 0
