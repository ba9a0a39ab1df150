"""What only the CUDA kernels of memory_attention and its gradient promise: the traffic of the tile schedules in
docs/ops/memory_attention.md and memory_attention_backward.md, bad indices that count as absent, M3_DEBUG=1."""

from __future__ import annotations

import os

import pytest
import torch
from simt import build, host, ptx, schedules
from test_cuda_ptx import assert_few_conflicts

from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples

FULL = os.environ.get("M3_PROOF") == "full"
FORWARD_VECTORS, GRADIENT_VECTORS, GRADIENT_KEYS = 128, 64, 64  # of a block
PAPER = samples.Spec(heads=(10, 2), sequences=((128, 128),), chunk=64, refs=5, tokens=8, slots=10, arena=True)
SPECS = {
    "paper": PAPER,  # two of the eight KV heads, one of the 32 sequences
    "later": samples.Spec(heads=(4, 1), sequences=((64, 320), (70, 70)), chunk=64, refs=2, tokens=24, slots=7),
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    host.load(build.build())


@pytest.fixture
def interpreter():
    if ptx.missing():
        pytest.skip(ptx.missing())


def moved(run) -> int:
    """Bytes between the SMs and the rest of the chip, in whole sectors."""
    kinds = ("global_load", "global_store", "async_copy")
    return sum(32 * result[kind]["sectors"] for _, result in run.results for kind in kinds)


@pytest.mark.parametrize("dim", (64, 80, 128) if FULL else (80,))
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", ["memory_attention", "memory_attention_backward"])
def test_traffic(op, spec, dim, interpreter):
    """At most 1.15 times the schedule's count, rows read whole, no detours in shared memory."""
    spec = samples.replace(SPECS[spec], dim=dim)
    make = samples.attention_sample if op == "memory_attention" else samples.backward_sample
    args, kwargs = make(spec)(torch.bfloat16, torch.Generator().manual_seed(0))
    with ptx.running(op, one_shape=not FULL) as run:
        host.call(op, *args, **kwargs)
    if op == "memory_attention":
        count = schedules.forward(args, FORWARD_VECTORS)
    else:
        count = schedules.backward(args[4:], GRADIENT_VECTORS, GRADIENT_KEYS)
    print(f"{op}: {moved(run)} bytes, {moved(run) / count:.3f} of the schedule's count")
    assert count <= moved(run) <= 1.15 * count
    assert all(result["async_copy"]["efficiency"] >= 0.9 for _, result in run.results)
    assert_few_conflicts(run)


@pytest.mark.parametrize("op", ["memory_attention", "memory_attention_backward"])
def test_bad_indices_count_as_absent(op):
    spec = samples.Spec(heads=(4, 2), dim=80, mem_heads=2, head_map=(1, 0), bias="normal", slots=4)
    make, at = (samples.attention_sample, 0) if op == "memory_attention" else (samples.backward_sample, 4)
    args, kwargs = make(spec)(torch.bfloat16, torch.Generator().manual_seed(0))

    def outputs(slots: tuple[int, int], lengths: tuple[int, int], head: int):
        changed = list(args)
        for i, places, values in ((8, ((0, 1), (2, 0)), slots), (9, ((1,), (2,)), lengths), (11, ((1,),), (head,))):
            changed[at + i] = args[at + i].clone()
            for place, value in zip(places, values, strict=True):
                changed[at + i][place] = value
        return host.call(op, *changed, **kwargs)

    tokens = args[at + 6].shape[2]
    bad = outputs(slots=(spec.slots, -7), lengths=(tokens + 9, -3), head=2)
    good = outputs(slots=(-1, -1), lengths=(tokens, 0), head=-1)
    for a, b in zip(bad, good, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "op, bad",
    [
        pytest.param(op, bad, id=f"{op}-{bad.id}")
        for op in ("memory_attention", "memory_attention_backward")
        for bad in OPS[op].bad_cases()
    ],
)
def test_refuses_bad_arguments(op, bad, monkeypatch):
    """Shapes and types always, values of index tensors where M3_DEBUG=1 asks for it."""
    if not bad.fake:
        monkeypatch.setenv("M3_DEBUG", "1")
    args, kwargs = bad.make()
    with pytest.raises(RuntimeError, match=bad.match):
        host.call(op, *args, **kwargs)


def test_gradients_are_the_same_bits_each_time():
    """In any schedule: sums have one owner and one order."""
    spec = samples.Spec(heads=(4, 2), dim=80, sequences=((70, 90),), chunk=20, refs=3, tokens=5, slots=2, bias="normal")
    args, kwargs = samples.backward_sample(spec)(torch.bfloat16, torch.Generator().manual_seed(0))
    first = host.call("memory_attention_backward", *args, **kwargs)
    for order in host.ORDERS:
        with host.schedule(order, seed=3):
            for a, b in zip(host.call("memory_attention_backward", *args, **kwargs), first, strict=True):
                assert torch.equal(a, b)
