"""M3_CUDA and M3_CUDA_ARCHS, what the built library says of itself, and which backend a call on CUDA gets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from memory3_kernels import _cuda, doctor, explain, use_backend
from memory3_kernels._backends import choose
from memory3_kernels._registry import OPS

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "_build"))
import cuda_build  # noqa: E402

KNOWN = {f"sm_{n}" for n in (75, 80, 86, 89, 90, 100, 120)}


@pytest.fixture
def toolkit(monkeypatch):
    """cuda_build.toolkit() with nothing remembered and nothing set."""
    for name in ("M3_CUDA", "M3_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    cuda_build.toolkit.cache_clear()
    yield cuda_build.toolkit
    cuda_build.toolkit.cache_clear()


@pytest.fixture
def made_up_nvcc(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    codes = " ".join(sorted(KNOWN))
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release 12.8, V12.8.1" || echo {codes}\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_build.find_nvcc, "find", lambda: nvcc)
    monkeypatch.setattr(cuda_build, "_local", lambda: cuda_build.DEFAULT)
    return nvcc


@pytest.mark.parametrize("text, wanted", [
    ("80", "80"), ("8.0;9.0+PTX", "80;90+PTX"), ("90, 80", "80;90"), ("12.0+PTX;80;80+PTX", "80+PTX;120+PTX"),
    ("release", cuda_build.RELEASE),
])  # fmt: skip
def test_archs_are_read(text, wanted):
    assert cuda_build.parse(text, KNOWN) == wanted


@pytest.mark.parametrize("text, match", [
    ("sm_80", 'expected a list like "80;90;120.PTX"'), ("75", "need compute capability 8.0"),
    ("103", "this nvcc has no sm_103"), (";", "at least one"),
])  # fmt: skip
def test_wrong_archs_are_refused(text, match):
    with pytest.raises(RuntimeError, match=match):
        cuda_build.parse(text, KNOWN)


def test_flags(toolkit, made_up_nvcc, monkeypatch):
    assert toolkit().library == "libm3_cuda_cu12.so" and toolkit().archs == cuda_build.DEFAULT
    toolkit.cache_clear()
    monkeypatch.setenv("M3_CUDA_ARCHS", "80;90+PTX")
    assert toolkit().targets == [
        "-gencode arch=compute_80,code=sm_80",
        "-gencode arch=compute_90,code=sm_90",
        "-gencode arch=compute_90,code=compute_90",
    ]


def test_M3_CUDA(toolkit, made_up_nvcc, monkeypatch):
    monkeypatch.setenv("M3_CUDA", "0")
    assert toolkit() is None
    toolkit.cache_clear()
    monkeypatch.setattr(cuda_build.find_nvcc, "find", lambda: None)
    monkeypatch.setenv("M3_CUDA", "auto")
    assert toolkit() is None
    toolkit.cache_clear()
    monkeypatch.setenv("M3_CUDA", "1")
    with pytest.raises(RuntimeError, match="M3_CUDA=1, but no nvcc was found: set CUDA_HOME"):
        toolkit()
    monkeypatch.setenv("M3_CUDA", "yes")
    with pytest.raises(RuntimeError, match="expected 0, 1 or auto"):
        toolkit()


@pytest.mark.parametrize("archs, capability, served", [
    ("80", (8, 0), True), ("80", (8, 9), True), ("80", (9, 0), False), ("80+PTX", (9, 0), True),
    ("86", (8, 0), False), ("90", (12, 0), False), ("80;120+PTX", (10, 0), False), ("80;120+PTX", (12, 1), True),
    ("", (8, 0), False),
])  # fmt: skip
def test_which_devices_a_build_serves(archs, capability, served):
    assert _cuda.serves(archs, capability) is served


def test_a_device_without_code_is_named(monkeypatch):
    monkeypatch.setattr(_cuda, "archs", lambda: "90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_cuda, "_reason", None)
    _cuda.device_refused.cache_clear()
    try:
        said = "libm3_cuda was built for 90, cuda:0 has compute capability 8.6: reinstall with M3_CUDA_ARCHS=86"
        assert _cuda.device_refused(0) == said
        report = doctor.examine()
        assert report["cuda"]["devices"] == [{"name": "made up", "capability": "8.6", "reason": said}]
        assert "made up, compute capability 8.6: not served" in doctor.render(report)
    finally:
        _cuda.device_refused.cache_clear()


def test_the_built_library_names_its_archs():
    if _cuda.reason():
        pytest.skip(_cuda.reason())
    for arch in _cuda.archs().split(";"):
        assert int(arch.removesuffix("+PTX")) >= cuda_build.OLDEST
    report = doctor.examine()["cuda"]
    assert report["reason"] is None and report["archs"] == _cuda.archs() and "memory_decode" in report["kernels"]


def fake(dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return torch.empty(1, 8, 80, dtype=dtype, device=device)


def test_backends_of_a_call_on_cuda():
    op = OPS["memory_decode"]
    wanted = "triton" if _cuda.reason() else "cuda"
    if wanted == "triton":
        pytest.importorskip("triton")
    assert choose(op, (fake(),)) == wanted
    text = explain("memory_decode", fake())
    assert f"{wanted:10s} chosen" in text and "native kernels are built for cpu only" in text
    assert choose(op, (fake(torch.float64),)) == "reference"
    assert choose(op, (torch.empty(1),)) in ("native", "reference")
    with use_backend("reference"):
        assert choose(op, (fake(),)) == "reference"
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot serve this call"):
        choose(op, (torch.empty(1),))


def test_M3_NATIVE_0_leaves_the_kernels_out():
    if os.environ.get("M3_NATIVE") == "0":
        assert _cuda.reason() == "M3_NATIVE=0" and _cuda.archs() == ""
