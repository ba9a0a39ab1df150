"""Proves the GPU kernels on a CPU, as far as that goes: every stage, type, head dimension and architecture.

    python -m bench gpu-proof --json FILE [--stage NAME ...] [-k EXPRESSION] [--minutes N] [--summary FILE]

The tests are those of tests/gpu with M3_PROOF=full; this command runs them stage by stage and keeps a record of each
(kernel, arch, stage, figures, verdict). FILE is gone on with: what passed there with the same sources is not run again.
Exit code 0: everything passed; 1: something failed; 3: something is missing (a tool, or time).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import environment
from ..report import document, show_table, write_json

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from simt import sources  # noqa: E402

PTX_TESTS = tuple(f"tests/gpu/test_cuda_{name}.py" for name in ("ptx", "attention", "decode", "records"))
CONTRACTS = ("memory3_kernels/testing/compare.py", "tests/test_ops.py")
CALLS = tuple(f"tests/simt/{name}.py" for name in ("__init__", "build", "host", "*cases"))
FUZZ = ("tests/simt/fuzz.py",)
SCHEDULES = ("tests/simt/record_cases.py", "tests/simt/schedules.py")
LIMITS = ("memory3_kernels/testing/cuda_limits.py", "memory3_kernels/testing/triton_limits.py")
NVCC, PTX = ("tests/simt/nvcc.py",), ("tests/simt/ptx.py", "memory3_kernels/testing/triton_ptx.py", LIMITS[0])
TRITON = (sources.triton, "memory3_kernels/testing/triton_ptx.py", LIMITS[0])
INTERPRETER = (sources.triton, "memory3_kernels/testing/triton_interpreter.py")
BUGS = ("tests/simt/bugs/*", "tests/simt/planted*.py")


def _sanitized() -> dict[str, str]:
    from simt import build

    return build.environment() | {"M3_SIMT_LIBRARY": str(build.build(sanitize=True))}


@dataclass(frozen=True)
class Stage:
    """`sources`: what a record depends on besides the stage's own files, as globs, or by the op that the record is of;
    `environment`: made when the stage begins."""

    name: str
    files: tuple[str, ...]
    about: str
    sources: tuple[str | Callable[[str], set[Path]], ...]
    environment: Callable[[], dict[str, str]] = field(default=lambda: {})

    def depends(self, op: str | None) -> set[Path]:
        """The files that a record of `op` depends on; None: of all ops."""
        found = {p for glob in (*self.files, *self.sources) if isinstance(glob, str) for p in ROOT.glob(glob)}
        for made_from in self.sources:
            if callable(made_from):
                found |= made_from(op or "*") or made_from("*")
        return {path for path in found if path.is_file()}

    def digest(self, op: str | None) -> str:
        """Of everything a record of `op` depends on: equal digests, equal verdicts."""
        found = hashlib.sha256()
        for path in sorted(self.depends(op)):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
        return found.hexdigest()[:16]


STAGES = {
    s.name: s
    for s in (
        Stage("fake", ("tests/gpu/test_fake_cuda.py",), "dispatch, tracing and export of fake CUDA tensors",
              ("memory3_kernels/*.py", "memory3_kernels/ops/*.py", *CONTRACTS)),
        Stage("resources", ("tests/gpu/test_cuda_compile.py",), "registers, spills, shared memory, instructions",
              (sources.kernel, *NVCC, LIMITS[0])),
        Stage("simt", ("tests/gpu/simulated.py",), "CUDA kernels on the SIMT host, sanitized, several schedules",
              (sources.host, sources.contract, *CALLS, *CONTRACTS), _sanitized),
        Stage("fuzz", ("tests/gpu/fuzzed.py",), "random calls on the SIMT host, sanitized",
              (sources.host, sources.contract, *CALLS, *FUZZ, *CONTRACTS), _sanitized),
        Stage("ptx", PTX_TESTS, "nvcc's PTX in the PTX interpreter: results, hazards, traffic",
              (sources.host, sources.contract, *NVCC, *PTX, *CALLS, *SCHEDULES, *CONTRACTS)),
        Stage("fuzz-ptx", ("tests/gpu/fuzzed.py",), "random calls in the PTX interpreter",
              (sources.host, sources.contract, *NVCC, *PTX, *CALLS, *FUZZ, *CONTRACTS)),
        Stage("triton-interpreter", ("tests/gpu/interpreter_rules.py", "tests/gpu/interpreted.py"),
              "Triton kernels in Triton's interpreter, bounds and races checked",
              (sources.contract, *INTERPRETER, *CONTRACTS), lambda: {"TRITON_INTERPRET": "1"}),
        Stage("triton-compile", ("tests/gpu/test_triton_compile.py",), "Triton kernels compiled per arch: resources",
              (sources.contract, *TRITON, *LIMITS, *CONTRACTS)),
        Stage("triton-ptx", ("tests/gpu/test_triton_ptx.py",),
              "Triton's PTX in the PTX interpreter: results, hazards, traffic",
              (sources.contract, *TRITON, *LIMITS, *SCHEDULES, *CONTRACTS)),
        Stage("bugs", ("tests/gpu/test_planted_bugs.py",), "planted bugs, each found by its stage",
              (sources.host, sources.contract, *NVCC, *PTX, *CALLS, *BUGS, *CONTRACTS)),
    )
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="records; gone on with if it is there")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--summary", metavar="FILE", type=Path, help="a row per stage and kernel, short enough to keep")


class Records:
    """The records of FILE, by (stage, test), and what is still to be proven."""

    def __init__(self, path: Path):
        self.path = path
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        self.rows: dict[tuple[str, str], dict[str, Any]] = {(row["stage"], row["test"]): row for row in rows}

    def kept(self, stage: Stage, digest: Callable[[str | None], str]) -> list[str]:
        """Tests that passed with the sources as they are."""
        return [
            test for (name, test), row in self.rows.items()
            if name == stage.name and row["verdict"] == "passed" and row["sources"] == digest(row["kernel"])
        ]  # fmt: skip

    def forget(self, stage: Stage, tests: list[str]) -> None:
        """Records of tests that are no longer there."""
        for key in [key for key in self.rows if key[0] == stage.name and key[1] not in tests]:
            del self.rows[key]

    def save(self, settings: dict[str, Any], left: dict[str, int]) -> None:
        write_json(self.path, document("gpu-proof", settings, describe(), list(self.rows.values()), left=left))

    def summary(self) -> list[dict[str, Any]]:
        """A row per stage and kernel, with the digests of what was proven."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for (stage, _), row in sorted(self.rows.items(), key=lambda item: list(STAGES).index(item[0][0])):
            one = found.setdefault((stage, row["kernel"]), {
                "stage": stage, "kernel": row["kernel"], "archs": [], "passed": 0, "failed": 0, "skipped": 0,
                "seconds": 0.0, "sources": [],
            })  # fmt: skip
            one[row["verdict"]] += 1
            one["seconds"] = round(one["seconds"] + row["seconds"], 1)
            for kept, value in (("archs", row["arch"]), ("sources", row["sources"])):
                if value is not None and value not in one[kept]:
                    one[kept].append(value)
        return list(found.values())


@cache
def describe() -> dict[str, Any]:
    """The machine and the tools."""
    from simt import nvcc

    about = environment.describe()
    about["packages"]["triton"] = environment.version("triton")
    return about | {"nvcc": nvcc.version()}


def lines(log: Path, process: subprocess.Popen, end: float) -> Iterator[dict[str, Any]]:
    """What the process logs, as it does; it is ended at `end`."""
    with open(log, encoding="utf-8") as file:
        pending = ""
        while True:
            alive = process.poll() is None
            pending += file.read()
            *whole, pending = pending.split("\n")
            yield from map(json.loads, whole)
            if not alive and not whole:
                return
            if alive and time.monotonic() > end:
                process.terminate()
                process.wait()
            if not whole:
                time.sleep(0.2)


def run_stage(stage: Stage, records: Records, expression: str, end: float, advance: Callable[[int, int], None],
              save: Callable[[], None]) -> int:  # fmt: skip
    """Runs what of a stage is not proven yet; returns how many tests are left without a record of these sources.

    Raises:
        RuntimeError: the tests could not even be collected.
    """
    files = [name for name in stage.files if (ROOT / name).is_file()]
    if not files:
        raise RuntimeError(f"stage {stage.name}: {', '.join(stage.files)} is not there")
    digest = cache(stage.digest)
    kept = records.kept(stage, digest)
    with tempfile.TemporaryDirectory() as folder:
        log, keep = Path(folder) / "log", Path(folder) / "keep"
        log.touch()
        keep.write_text(json.dumps(kept))
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        env = os.environ | {"M3_PROOF": "full", "M3_PROOF_LOG": str(log), "M3_PROOF_KEEP": str(keep),
                            "PYTHONPATH": path} | stage.environment()  # fmt: skip
        options = ["-p", "bench.proof_plugin", "-W", "ignore", *(["-k", expression] if expression else [])]
        command = [sys.executable, "-m", "pytest", *options, *files]
        with open(Path(folder) / "out", "w+") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
            collected, done, saved = None, set(), time.monotonic()
            try:
                for line in lines(log, process, end):
                    if "collected" in line:
                        collected = line["collected"]
                        advance(len(collected), len(set(collected) & set(kept)))
                        continue
                    records.rows[stage.name, line["test"]] = {
                        "stage": stage.name,
                        **line,
                        "sources": digest(line["kernel"]),
                    }
                    done.add(line["test"])
                    advance(0, 1)
                    if time.monotonic() - saved > 10:
                        save()
                        saved = time.monotonic()
            finally:
                if process.poll() is None:
                    process.kill()
            if collected is None or not (collected or expression):
                out.seek(0)
                raise RuntimeError(f"stage {stage.name}: pytest collected nothing:\n{out.read()[-3000:]}")
            if process.returncode < 0 and time.monotonic() < end:
                out.seek(0)
                print(f"stage {stage.name} was ended by signal {-process.returncode}:\n{out.read()[-3000:]}",
                      file=sys.stderr)  # fmt: skip
    if not expression:
        records.forget(stage, collected)
    return len(set(collected) - done - set(kept))


def main(args: argparse.Namespace) -> int:
    records, left, broken = Records(args.json), {}, {}
    settings = {"stages": args.stage, "expression": args.k}
    end = time.monotonic() + 60 * args.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in args.stage:
            task = progress.add_task(name, total=None)

            def advance(more: int, done: int, task=task) -> None:
                total = (progress.tasks[task].total or 0) + more
                progress.update(task, total=total, advance=done)

            try:
                left[name] = run_stage(
                    STAGES[name], records, args.k, end, advance, lambda: records.save(settings, left)
                )
            except RuntimeError as error:
                broken[name] = str(error)
            records.save(settings, left)
    if args.summary:
        write_json(args.summary, document("gpu-proof-summary", settings, describe(), records.summary(), left=left))
    show(records, args.stage, left, broken)
    return exit_code(records, args.stage, left, broken)


def exit_code(records: Records, stages: list[str], left: dict[str, int], broken: dict[str, str]) -> int:
    verdicts = Counter(row["verdict"] for (stage, _), row in records.rows.items() if stage in stages)
    if verdicts["failed"]:
        return 1
    return 3 if broken or any(left.values()) or verdicts["skipped"] or not verdicts["passed"] else 0


def show(records: Records, stages: list[str], left: dict[str, int], broken: dict[str, str]) -> None:
    shown = []
    for name in stages:
        rows = [row for (stage, _), row in records.rows.items() if stage == name]
        count = Counter(row["verdict"] for row in rows)
        kernels = len({row["kernel"] for row in rows if row["kernel"]})
        why = broken.get(name) or next((row["detail"] for row in rows if row["verdict"] == "skipped"), "")
        shown.append([
            f"{name}: {STAGES[name].about}", str(kernels), str(count["passed"]), str(count["failed"]),
            str(count["skipped"]), str(left.get(name, "?")), f"{sum(row['seconds'] for row in rows):.0f}",
            why.splitlines()[0][:60] if why else "",
        ])  # fmt: skip
    show_table("gpu-proof", ("stage", "kernels", "passed", "failed", "skipped", "left", "seconds", ""), shown)
    for (stage, test), row in records.rows.items():
        if row["verdict"] == "failed" and stage in stages:
            print(f"FAILED {stage} {test}\n  {row['detail'].strip().splitlines()[-1] if row['detail'].strip() else ''}")
