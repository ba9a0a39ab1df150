"""`python -m memory3_kernels.doctor`: what it reports, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from memory3_kernels import _load, doctor, use_backend
from memory3_kernels._registry import OPS

NATIVE = os.environ.get("M3_NATIVE", "1") != "0"


def run_doctor(*arguments: str, code: int, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "memory3_kernels.doctor", *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("M3_")} | environment,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_without_native_kernels():
    report = json.loads(run_doctor("--json", code=1, M3_NATIVE="0"))
    assert report["native"]["reason"] == "M3_NATIVE=0"
    assert report["simd"] == {"available": [], "used": None, "note": None}
    assert set(report["ops"]) == set(OPS) and set(report["ops"].values()) == {"reference"}
    assert report["environment"]["M3_NATIVE"] == "0"


def test_with_native_kernels_and_unusable_level():
    if not NATIVE:
        pytest.skip("M3_NATIVE=0: this run covers the references")
    text = run_doctor(code=0, M3_SIMD="avx9")
    assert "in use, " in text and "M3_SIMD='avx9' is not one of none, avx2, avx512, avx512bf16, amx" in text
    assert "select_tokens" in text and torch.__version__ in text
    assert "calls           past the dispatcher" in text


def test_report_agrees_with_the_library():
    report = doctor.examine()
    assert report["native"]["reason"] == _load.native_reason()
    assert report["simd"]["used"] == _load.simd_level()
    assert report["simd"]["available"] == _load.available_simd_levels()
    assert report["threads"] == torch.get_num_threads()
    assert report["cpu"]["model"]
    json.dumps(report)
    for name, path in report["native"]["libraries"].items():
        assert path is None or path.endswith(name)


def test_level_the_cpu_lacks_is_explained():
    assert doctor._simd_note("avx512", "avx2", ["none", "avx2"]) == (
        "M3_SIMD=avx512 is more than this CPU or build has; avx2 is used"
    )
    assert doctor._simd_note("avx2", "avx2", ["none", "avx2"]) is None
    assert doctor._simd_note(None, "avx2", ["none", "avx2"]) is None


def test_forced_backend_is_shown():
    with use_backend("select_tokens:reference"):
        ops = doctor.examine()["ops"]
    assert ops["select_tokens"] == "reference (forced)"
    assert "forced" not in ops["gather_memory"]


def test_report_without_torch():
    code = "import sys; sys.modules['torch'] = None; from memory3_kernels import doctor; sys.exit(doctor.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "torch missing" in done.stdout and "torch is not installed" in done.stdout
