"""A wheel built from this tree carries the native libraries and works away from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(build, capture_output=True, text=True, timeout=600, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("memory3-*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name, (
        "the numpy module is per Python version"
    )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"memory3_kernels/lib/libm3_cpu.so", "memory3_kernels/lib/libm3_torch.so"} <= set(names)
    assert any(n.startswith("memory3_kernels/_numpy") and n.endswith(".so") for n in names)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "build"))]
    # Away from the tree, with nothing but the unpacked wheel on the path.
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import memory3_kernels as m, json; from memory3_kernels import doctor; r = doctor.examine(); print(json.dumps([m.__file__, r['native']['reason']]))"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    file, reason = json.loads(done.stdout)
    assert file.startswith(str(tmp_path)) and reason is None
