"""A wheel built from this tree carries the native libraries, CPU and CUDA, and works away from it, under any torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from memory3_kernels import _cuda

ROOT = Path(__file__).parent.parent
# Run with nothing but the unpacked wheel on the path.
PROBE = """
import json, torch
import memory3_kernels as m3
from memory3_kernels import _cuda, doctor
from memory3_kernels._registry import OPS
from torch._subclasses import FakeTensorMode

a, b = torch.randn(3, 2, 80), torch.randn(3, 2, 80)
lse = torch.randn(3, 2)
out, _ = m3.merge_attention_states(a, lse, b, lse)
with FakeTensorMode():
    half = torch.empty(3, 2, 80, dtype=torch.bfloat16, device="cuda")
    sums = torch.empty(3, 2, device="cuda")
    fake, _ = m3.merge_attention_states(half, sums, half, sums)
torch.library.opcheck(OPS["merge_attention_states"].overload, (a, lse, b, lse))
report = doctor.examine()
print(json.dumps({
    "file": m3.__file__,
    "torch": torch.__version__,
    "native": report["native"]["reason"],
    "cuda": report["cuda"],
    "right": bool(torch.allclose(out, (a + b) / 2, atol=1e-6)),
    "fake": [str(fake.device), str(fake.dtype), list(fake.shape)],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(build, capture_output=True, text=True, timeout=900, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("memory3-*.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder / "site")
    return made


def probe(wheel: Path, python: str) -> dict:
    env = {**os.environ, "PYTHONPATH": str(wheel.parent / "site")}
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, env=env, cwd=wheel.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict, wheel: Path) -> None:
    assert found["file"].startswith(str(wheel.parent)) and found["native"] is None
    assert found["right"] and found["fake"] == ["cuda:0", "torch.bfloat16", [3, 2, 80]]
    if _cuda.reason() is None:
        assert found["cuda"]["reason"] is None and found["cuda"]["archs"] == _cuda.archs()
        assert "memory_decode" in found["cuda"]["kernels"]


@pytest.mark.slow
def test_wheel(wheel):
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name, (
        "the numpy module is per Python version"
    )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wanted = {f"memory3_kernels/{n}" for n in ("lib/libm3_cpu.so", "lib/libm3_torch.so", "_direct.abi3.so")}
    if _cuda.reason() is None:
        wanted |= {f"memory3_kernels/lib/{name}" for name in (_cuda.library_path().name, _cuda.BINDING.name)}
    assert wanted <= set(names)
    assert any(n.startswith("memory3_kernels/_numpy") and n.endswith(".so") for n in names)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "build"))]
    check(probe(wheel, sys.executable), wheel)


@pytest.mark.slow
def test_wheel_under_another_torch(wheel):
    """The same file, without building again, where M3_OTHER_PYTHON has another torch: the newest one for CUDA, say."""
    python = os.environ.get("M3_OTHER_PYTHON")
    if not python:
        pytest.skip("M3_OTHER_PYTHON names no interpreter with another torch")
    found = probe(wheel, python)
    check(found, wheel)
    import torch

    assert found["torch"] != torch.__version__
