"""Triton's PTX, run by the PTX interpreter against the references: no access out of bounds, no read of what nobody
wrote, no race in shared memory, no use of an asynchronous copy under way; and the traffic.

By default a few cases of each op in bfloat16; M3_PROOF=full: all cases in bfloat16, for sm_80 and sm_90 (wgmma) by
turns, and a third of them in another type on the other one.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import test_ops
import torch
from simt import record_cases, schedules
from torch import Tensor

from memory3_kernels import triton, use_backend
from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import merge_attention_states as merge
from memory3_kernels.testing.triton_limits import EFFICIENCY, MOVED, PASSES

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
            runs = [(torch.bfloat16, ARCHS[i % 2])]  # by turns: both targets see every op
            if FULL and i % 3 == 0:  # and every op in every type
                runs.append(((torch.float16, torch.float32)[i // 3 % 2], ARCHS[(i + 1) % 2]))
            for dtype, arch in runs:
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


COPIES, QUEUED = ("global_load", "global_store"), ("async_copy",)
PAPER = samples.Spec(heads=(10, 2), dim=80, sequences=((128, 128),), refs=5, tokens=8, slots=10, chunk=64, arena=True)
DECODE = samples.Spec(heads=(40, 8), dim=80, sequences=((1, 256),) * 2, refs=5, tokens=8, slots=10, spare=0)
SPLIT = replace(DECODE, heads=(20, 4), sequences=((1, 1024),), slots=5)


def streams():
    """(op, arguments, kinds of instruction that carry the streamed operands), at the paper's shape."""
    yield "memory_attention", samples.attention_sample(PAPER), QUEUED
    yield "memory_decode", samples.decode_sample(DECODE), QUEUED
    yield "memory_decode", samples.decode_sample(SPLIT), QUEUED
    yield "memory_decode_coded", samples.coded_sample(DECODE, (14, 8, 10), half_tables=True), QUEUED
    yield "memory_decode_coded", samples.coded_sample(DECODE, (14, 8, 10)), QUEUED  # with rotations
    yield "merge_attention_states", merge._sample(64, 40, 80), COPIES
    for stream in record_cases.streams((80,)):
        # A piece of a vector that is not rotated is stored by itself: 10 values of 160 bytes, parts of sectors.
        carried = {"select_tokens": QUEUED, "gather_memory": COPIES, "scatter_memory": COPIES}.get(stream.op)
        carried = carried or (() if "no-rotation" in stream.id else ("global_store",))
        if FULL or "fp32" not in stream.id:
            yield stream.op, stream.case.make, carried


def assert_streamed(result, kinds) -> None:
    for kind in kinds:
        assert result[kind]["efficiency"] >= EFFICIENCY, f"{kind}: {result[kind]}"
    for kind in ("shared_load", "shared_store", "ldmatrix", "async_copy_shared"):
        assert result[kind]["wavefronts"] <= PASSES * result[kind]["ideal_wavefronts"], f"{kind}: {result[kind]}"


def counted(name, make, arch=80):
    """(compulsory bytes, arguments, the runner) of a call in bfloat16."""
    args, kwargs = make(torch.bfloat16, torch.Generator().manual_seed(0))
    compulsory = OPS[name].cost(*args, **kwargs).bytes
    return compulsory, args, run(OPS[name], args, kwargs, arch)[1]


@pytest.mark.parametrize("arch", ARCHS if FULL else ARCHS[:1])
@pytest.mark.parametrize(
    "name, make, kinds", [pytest.param(*stream, id=f"{stream[0]}-{i}") for i, stream in enumerate(streams())]
)
def test_traffic(name, make, kinds, arch, record_property):
    """Every byte once per launch, results of splits included; operands in whole sectors, few conflicts of banks."""
    compulsory, _, runner = counted(name, make, arch)
    moved = sum(r["unique"]["read_bytes"] + r["unique"]["written_bytes"] for _, r in runner.results)
    record_property("moved", round(moved / compulsory, 3))
    assert moved <= MOVED * compulsory
    for launch, result in runner.results:
        # The merge of splits reads what lies in the second-level cache.
        streamed = () if launch.kernel.__name__ == "merge_splits_kernel" else kinds
        assert_streamed(result, streamed)


def test_attention_asks_for_what_its_tiles_need():
    """Blocks of 128 vectors read keys and values; of 64 vectors for dq; q and grad_out are read by blocks of 64 keys
    for dk and dv, and for each record."""
    _, args, runner = counted("memory_attention", samples.attention_sample(PAPER))
    wanted = {"attention_kernel": schedules.keys_read(args, 128)}
    results = list(runner.results)
    _, args, runner = counted("memory_attention_backward", samples.backward_sample(PAPER))
    call, pair = args[4:], 2 * args[4].shape[2] * args[4].element_size()  # a vector of q and of grad_out
    wanted["query_gradient_kernel"] = schedules.keys_read(call, 64)
    wanted["context_gradient_kernel"] = schedules.vectors_seen(call, 64) * pair
    wanted["record_gradient_kernel"] = PAPER.refs * call[0].shape[0] * call[0].shape[1] * pair
    results += runner.results
    assert [launch.kernel.__name__ for launch, _ in results] == list(wanted)
    for launch, result in results:
        count = wanted[launch.kernel.__name__]
        assert count <= 32 * result["async_copy"]["sectors"] <= MOVED * count, launch.kernel.__name__
        assert_streamed(result, QUEUED)


def test_traffic_is_counted_for_every_op():
    assert {name for name, *_ in streams()} | {"memory_attention_backward"} == set(CASES)
