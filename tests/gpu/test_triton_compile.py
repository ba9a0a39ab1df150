"""Triton kernels as ptxas compiles them, without a driver, held against memory3_kernels/testing/triton_limits.py.

By default bfloat16 at the paper's shape (40/8 heads of 80) for sm_80 and sm_90; M3_PROOF=full: all shapes and types for
every architecture.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from memory3_kernels import triton
from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import select_tokens

FULL = os.environ.get("M3_PROOF") == "full"
ARCHS = (80, 86, 89, 90, 100, 120) if FULL else (80, 90)
SHAPES = {
    "H40x8_D80": ((40, 8), 80),
    "H9x3_D64": ((9, 3), 64),
    "H32x8_D128": ((32, 8), 128),
    "H8x4_D256": ((8, 4), 256),
}
BASE = samples.Spec(sequences=((64, 128),), chunk=64, refs=5, tokens=8, slots=5, arena=True)


@pytest.fixture(autouse=True)
def available():
    if triton.missing():
        pytest.skip(triton.missing())


def attention_calls(shape: str):
    """(op, function that makes arguments) at one shape of heads."""
    heads, dim = SHAPES[shape]
    spec = replace(BASE, heads=heads, dim=dim)
    decode = replace(spec, sequences=((1, 1024),))
    yield "memory_attention", samples.attention_sample(spec)
    yield "memory_attention", samples.attention_sample(replace(spec, bias="normal", head_map=tuple(range(heads[1]))))
    yield "memory_attention_backward", samples.backward_sample(spec)
    yield "memory_decode", samples.decode_sample(replace(spec, sequences=((1, 256),)))
    yield "memory_decode", samples.decode_sample(decode)
    yield "memory_decode", samples.decode_sample(replace(decode, page=16))
    yield "memory_decode_coded", samples.coded_sample(decode, (6, 8, 10))
    for rule in select_tokens.RULES:
        yield "select_tokens", select_tokens._sample(1, 128, *heads, dim, 8, rule)


def other_calls():
    """The ops that know no heads, at the shapes their contracts have for benchmarks."""
    for name, op in OPS.items():
        if triton.has_kernel(name) and not name.startswith(("memory_", "select_")):
            yield from ((name, case.make) for case in op.cases() if case.bench)


def grid():
    types = (torch.bfloat16, torch.float16, torch.float32) if FULL else (torch.bfloat16,)
    for dtype in types:
        # Float32 is for tests and comparisons: beyond 64 values its products in three parts spill registers.
        shapes = ("H9x3_D64",) if dtype is torch.float32 else list(SHAPES)[: None if FULL else 1]
        for shape in shapes:
            for i, (name, make) in enumerate(attention_calls(shape)):
                yield pytest.param(name, make, dtype, id=f"{name}-{i}-{shape}-{str(dtype).removeprefix('torch.')}")
    for i, (name, make) in enumerate(other_calls()):
        yield pytest.param(name, make, torch.bfloat16, id=f"{name}-{i}")


@cache
def launches(name, make, dtype) -> list:
    """The launches of a call, none of which run. Each kernel and set of constants once."""
    from memory3_kernels.triton import _launch

    args, kwargs = make(dtype, torch.Generator().manual_seed(0))
    found = []
    with _launch.use_runner(found.append):
        triton.implementation(name)(*args, **kwargs)
    assert found
    return found


def test_every_op_is_here():
    named = {p.values[0] for p in grid()}
    assert named == {name for name in OPS if triton.has_kernel(name)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name, make, dtype", list(grid()))
def test_resources(name, make, dtype, arch):
    from memory3_kernels.testing.triton_limits import LIMITS
    from memory3_kernels.testing.triton_ptx import figures

    for launch in launches(name, make, dtype):
        found = figures(launch, arch)
        limits = LIMITS[found.kernel]
        where = f"{found.kernel} on sm_{arch} {launch.constants}"
        assert not found.faults(), f"{where}: {found.faults()}"
        assert found.registers <= limits.registers, f"{where}: {found.registers} registers, {limits.registers} wanted"
        for pattern in limits.present:
            assert found.count(pattern), f"{where}: no {pattern}"
        for pattern in limits.absent:
            assert not found.count(pattern), f"{where}: {found.count(pattern)} x {pattern}"
