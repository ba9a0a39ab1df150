"""CUDA kernels without a GPU: the same sources, compiled by g++ for the SIMT host of tests/simt, under
AddressSanitizer and UndefinedBehaviorSanitizer, in several schedules (simulated.py has the tests)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from simt import build

HERE = Path(__file__).parent


def test_kernels_match_their_references():
    environment = build.environment() | {
        "M3_SIMT_LIBRARY": str(build.build(sanitize=True)),
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, "-m", "pytest", "-x", str(HERE / "simulated.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=build.ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-6000:]
