"""Triton's PTX, run by the PTX interpreter against the references: no access out of bounds, no read of what nobody
wrote, no race in shared memory, no use of an asynchronous copy under way; and the traffic.

By default a few cases of each op in bfloat16; M3_PROOF=full: all cases in all types, for sm_80 and sm_90 (wgmma).
"""

from __future__ import annotations

import os

import pytest
import test_ops
import torch
from torch import Tensor

from memory3_kernels import triton, use_backend
from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples

FULL = os.environ.get("M3_PROOF") == "full"
ARCHS = (80, 90)
# Between them: a group that fills no tile, a masked tail of the head dimension, records that end in the middle of a
# tile, heads without records, pages, several splits and several tiles of context, each op's every kernel.
CASES = {
    "merge_attention_states": None,
    "scatter_memory": None,
    "gather_memory": None,
    "vq_dequantize": None,
    "gather_dequantize": None,
    "memory_attention": ("group5_D80", "head-map", "blocks"),
    "memory_attention_backward": ("group3_D64_arena", "blocks"),
    "memory_decode": ("group5_D80", "paged", "long"),
    "memory_decode_coded": ("group5_D80_PQ8x10",),
    "select_tokens": ("causal-group5_T70_D80", "received-lengths-start_T37_D24_K5"),
}


@pytest.fixture(autouse=True)
def available():
    for reason in (triton.missing(), triton_ptx().missing_ptxrun()):
        if reason:
            pytest.skip(reason)


def triton_ptx():
    from memory3_kernels.testing import triton_ptx

    return triton_ptx


def chosen(op) -> list:
    cases = [case for case in op.cases() if not case.slow]
    if FULL:
        return cases
    wanted = CASES[op.name]
    return cases[:1] if wanted is None else [case for case in cases if case.id in wanted]


def grid():
    for op in OPS.values():
        if not triton.has_kernel(op.name):
            continue
        for i, case in enumerate(chosen(op)):
            for dtype in op.dtypes if FULL else (torch.bfloat16,):
                # Both targets see every op: by turns, or all of it.
                for arch in ARCHS if FULL else (ARCHS[i % 2],):
                    name = f"{op.name}-{case.id}-{str(dtype).removeprefix('torch.')}-sm_{arch}"
                    yield pytest.param(op, case, dtype, arch, id=name)


def test_every_op_is_here():
    assert set(CASES) == {name for name in OPS if triton.has_kernel(name)}


def run(op, args, kwargs, arch):
    from memory3_kernels.triton import _launch

    runner = triton_ptx().PtxRunner(arch)
    with _launch.use_runner(runner), use_backend("triton"):
        outputs = test_ops.run(op, args, kwargs)
    # Layouts with copies of a value in several lanes make Triton store it several times to one place: harmless.
    found = [str(f) for _, result in runner.results for f in result.findings if f.kind != "race-waw-same-value"]
    assert not found, "\n".join(found)
    return outputs, runner


@pytest.mark.parametrize("op, case, dtype, arch", list(grid()))
def test_matches_reference(op, case, dtype, arch):
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    outputs, _ = run(op, args, kwargs, arch)
    test_ops.check(op, outputs, before, kwargs, op.tolerance[dtype])
    for i, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor) and i not in op.mutates:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{op.name} wrote to argument {i}"


@pytest.mark.parametrize("batch, heads, dim, context", [(2, (40, 8), 80, 256), (1, (20, 4), 80, 1024)])
def test_decode_traffic(batch, heads, dim, context):
    """At most 1.15 times what has to be moved: every byte once per launch, results of splits included."""
    lines = ((1, context),) * batch
    spec = samples.Spec(heads=heads, dim=dim, sequences=lines, refs=5, tokens=8, slots=5 * batch, spare=0)
    args, kwargs = samples.decode_sample(spec)(torch.bfloat16, torch.Generator().manual_seed(0))
    _, runner = run(OPS["memory_decode"], args, kwargs, 80)
    moved = sum(r["unique"]["read_bytes"] + r["unique"]["written_bytes"] for _, r in runner.results)
    assert moved <= 1.15 * OPS["memory_decode"].cost(*args, **kwargs).bytes
    assert all(r["async_copy"]["efficiency"] >= 0.9 for _, r in runner.results if r["async_copy"]["bytes"])
