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
PAPER = "H40x8_D80"
SHAPES = {
    PAPER: ((40, 8), 80),
    "H9x3_D64": ((9, 3), 64),
    "H32x8_D128": ((32, 8), 128),
    "H8x4_D256": ((8, 4), 256),
}
BASE = samples.Spec(sequences=((64, 128),), chunk=64, refs=5, tokens=8, slots=5, arena=True)


@pytest.fixture(autouse=True)
def available():
    if triton.missing():
        pytest.skip(triton.missing())


def attention_calls(shape: str, variants: bool):
    """(op, function that makes arguments) at one shape of heads: every kernel, or every variant of every kernel."""
    heads, dim = SHAPES[shape]
    spec = replace(BASE, heads=heads, dim=dim)
    decode = replace(spec, sequences=((1, 1024),))
    yield "memory_attention", samples.attention_sample(spec)
    yield "memory_attention_backward", samples.backward_sample(spec)
    yield "memory_decode", samples.decode_sample(decode)  # splits and their merge
    yield "memory_decode_coded", samples.coded_sample(decode, (6, 8, 10))
    yield "select_tokens", select_tokens._sample(1, 128, *heads, dim, 8, "received")
    if variants:
        mapped = replace(spec, bias="normal", head_map=tuple(range(heads[1])))
        yield "memory_attention", samples.attention_sample(mapped)
        yield "memory_attention_backward", samples.backward_sample(mapped)
        yield "memory_decode", samples.decode_sample(replace(spec, sequences=((1, 256),)))  # one split
        yield "memory_decode", samples.decode_sample(replace(decode, page=16))
        for rule in ("exp", "causal"):
            yield "select_tokens", select_tokens._sample(1, 128, *heads, dim, 8, rule)


def other_calls():
    """The ops that know no heads, at the shapes their contracts have for benchmarks."""
    for name, op in OPS.items():
        if triton.has_kernel(name) and not name.startswith(("memory_", "select_")):
            yield from ((name, case.make) for case in op.cases() if case.bench)


def matrix():
    """(type, shape of heads, whether all variants, architectures). Types differ in the products they are made of, head
    dimensions in tiles, variants in masks and addresses: no product of the three is needed."""
    yield torch.bfloat16, PAPER, True, ARCHS
    if FULL:
        yield from ((torch.bfloat16, shape, False, ARCHS) for shape in SHAPES if shape != PAPER)
        yield torch.float16, PAPER, False, ARCHS
        yield torch.float32, PAPER, False, ARCHS  # its widest tile that fits; see docs/triton.md for 256
        yield torch.float32, "H9x3_D64", False, (80, 90)


def grid():
    for dtype, shape, variants, archs in matrix():
        for i, (name, make) in enumerate(attention_calls(shape, variants)):
            id = f"{name}-{i}-{shape}-{str(dtype).removeprefix('torch.')}"
            yield from (pytest.param(name, make, dtype, arch, id=f"{id}-{arch}") for arch in archs)
    for i, (name, make) in enumerate(other_calls()):
        yield from (pytest.param(name, make, torch.bfloat16, arch, id=f"{name}-{i}-{arch}") for arch in ARCHS)


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


@pytest.mark.parametrize("name, make, dtype, arch", list(grid()))
def test_resources(name, make, dtype, arch, record_property):
    from memory3_kernels.testing.triton_limits import LIMITS, asked
    from memory3_kernels.testing.triton_ptx import figures

    for launch in launches(name, make, dtype):
        found = figures(launch, arch)
        stack, present, absent = asked(found.kernel, dtype, arch)
        where, wanted = f"{found.kernel} on sm_{arch} {launch.constants}", LIMITS[found.kernel].registers
        assert not found.faults(stack), f"{where}: {found.faults(stack)}"
        assert found.registers <= wanted, f"{where}: {found.registers} registers, {wanted} wanted"
        record_property(found.kernel, found.registers)
        for pattern in present:
            assert found.count(pattern), f"{where}: no {pattern}"
        for pattern in absent:
            assert not found.count(pattern), f"{where}: {found.count(pattern)} x {pattern}"
