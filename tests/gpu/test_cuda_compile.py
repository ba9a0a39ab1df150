"""CUDA kernels as nvcc compiles them, held against their limits (memory3_kernels/testing/cuda_limits.py).

By default one element type and head dimension on two architectures; M3_PROOF=full: all of them on all.
"""

from __future__ import annotations

import os

import pytest
from simt import host, nvcc

from memory3_kernels.testing.cuda_limits import LIMITS

FULL = os.environ.get("M3_PROOF") == "full"
ARCHS = nvcc.ARCHS if FULL else (80, 90)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", host.names())
def test_resources(op, arch, record_property):
    if nvcc.missing_tools():
        pytest.skip(nvcc.missing_tools())
    found = nvcc.resources(op, arch, one_shape=not FULL)
    assert found
    record_property("registers", {kernel.kernel: kernel.registers for kernel in found})
    for kernel in found:
        limits = LIMITS[kernel.name]
        where = f"{kernel.name} on sm_{arch} ({kernel.kernel})"
        assert kernel.stack == 0 and kernel.spills == 0, f"{where}: local memory"
        assert kernel.registers <= limits.registers, f"{where}: {kernel.registers} registers, {limits.registers} wanted"
        for pattern in limits.present:
            assert kernel.count(pattern), f"{where}: no {pattern}"
        for pattern in limits.absent:
            assert not kernel.count(pattern), f"{where}: {kernel.count(pattern)} x {pattern}"
