"""The ops' benchmark cases for people who live in pytest-benchmark: `pytest bench --benchmark-columns=median,iqr`.

The same cases, operands and gate as `python -m bench run`, warm, at the best SIMD level; bytes and GB/s are in
`extra_info`.
"""

from __future__ import annotations

import pytest
import torch

import memory3_kernels  # noqa: F401  (registers the ops)
from memory3_kernels import _load
from memory3_kernels._registry import OPS

from . import measure, run

CASES = [(op, case) for op in OPS.values() for case in op.cases() if case.bench]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op.name}-{case.id}" for op, case in CASES])
def test_op(benchmark, op, case):
    level = _load.simd_level()
    if level is None:
        pytest.skip(f"there is no native library to time ({_load.native_reason()})")
    dtype = run.dtype_of(op, "bfloat16")
    args, kwargs = measure.operands(case, dtype)
    measure.gate(op, [f"native-{level}"], args, kwargs, case.slack * op.tolerance[dtype])
    cost = op.cost(*args, **kwargs)
    benchmark.group = op.name
    with torch.no_grad():
        benchmark(op, *args, **kwargs)
    benchmark.extra_info |= {"level": level, "bytes": cost.bytes, "flops": cost.flops}
    if benchmark.stats is not None:  # --benchmark-disable leaves none
        benchmark.extra_info["gb_per_s"] = cost.bytes / benchmark.stats.stats.median / 1e9
