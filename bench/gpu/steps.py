"""What gpu-check runs in processes of their own: the op tests, and the same under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_ops.py", "tests/gpu/test_device.py")
# The sanitizer is some hundred times slower: the CUDA kernels in one type, without torch's own test machinery.
SANITIZED = ("tests/gpu/test_device.py",)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # exit code of compute-sanitizer where it has findings


@dataclass(frozen=True)
class Step:
    """`verdict`: passed, failed, or skipped (then `detail` says why)."""

    name: str
    verdict: str
    detail: str
    seconds: float = 0.0


def _pytest(files: tuple[str, ...], *options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *files, *options]


def _workers() -> list[str]:
    """Triton's compiler is what the tests wait for: several processes where pytest-xdist is installed."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(12, len(os.sched_getaffinity(0)) - 2)))]


def _run(command: list[str], timeout: float, **variables: str) -> tuple[subprocess.CompletedProcess | None, float]:
    begin = time.monotonic()
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout, errors="replace"
        )
    except subprocess.TimeoutExpired:
        done = None
    return done, time.monotonic() - begin


def tests(timeout: float = 3600) -> Step:
    """Every op x backend on the GPU."""
    done, seconds = _run(_pytest(TESTS, *_workers(), "-k", "device or cuda_kernels or captured"), timeout)
    if done is None:
        return Step("tests", "failed", f"not done after {timeout:.0f} s", seconds)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
    failures = re.findall(r"^FAILED (.*)$", done.stdout, re.MULTILINE)
    detail = last[0] if not failures else last[0] + "; " + "; ".join(failures[:20])
    passed = done.returncode == 0 and " passed" in last[0]
    return Step("tests", "passed" if passed else "failed", detail, seconds)


def sanitizer(tool: str, timeout: float = 3600) -> Step:
    """The CUDA kernels under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Step(tool, "skipped", "compute-sanitizer is not installed (CUDA toolkit, or nvidia-cuda-sanitizer-api)")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", "--print-limit",
               "20", *_pytest(SANITIZED, "-k", "cuda_kernels and bfloat16", "-p", "no:faulthandler")]  # fmt: skip
    done, seconds = _run(command, timeout, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # its own blocks hide what lies beyond
    if done is None:
        return Step(tool, "failed", f"not done after {timeout:.0f} s", seconds)
    said = re.findall(r"^=+ (.*)$", done.stdout + done.stderr, re.MULTILINE)
    summary = next((line for line in reversed(said) if "SUMMARY" in line), f"exit code {done.returncode}")
    detail = summary if done.returncode == 0 else summary + "; " + "; ".join(said[:20])
    return Step(tool, "passed" if done.returncode == 0 else "failed", detail, seconds)
