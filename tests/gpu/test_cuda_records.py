"""What the CUDA kernels that write and decode records refuse, and what they take as absent: values of index tensors are
never looked at on the host but under M3_DEBUG=1. On the SIMT host, through the CUDA bindings."""

from __future__ import annotations

import pytest
import torch
from simt import build, host

from memory3_kernels._registry import OPS
from memory3_kernels.ops import gather_dequantize, gather_memory, scatter_memory, select_tokens, vq_dequantize

CHECKED = ("select_tokens", "gather_memory", "scatter_memory", "gather_dequantize")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    host.load(build.build())


def sample(make, dtype=torch.bfloat16):
    return make(dtype, torch.Generator().manual_seed(0))


def test_gather_memory_takes_a_bad_index_as_absent():
    (k, v, index), _ = sample(gather_memory._sample(2, 9, 3, 64, 4))
    bad, absent = index.clone(), index.clone()
    bad[0, 0, 1], bad[1, 2, 3], bad[1, 0, 0] = 9, -2, 2**31 - 1
    absent[0, 0, 1] = absent[1, 2, 3] = absent[1, 0, 0] = -1
    assert torch.equal(host.call("gather_memory", k, v, bad), gather_memory.reference(k, v, absent))


def test_scatter_memory_skips_a_bad_slot():
    (arena, records, _), _ = sample(scatter_memory._sample(4, (2, 8), [0, 0, 0, 0]))
    before, expected = arena.clone(), arena.clone()
    host.call("scatter_memory", arena, records, torch.tensor([4, 2, -2, -(2**31)], dtype=torch.int32))
    expected[2] = records[1]
    assert torch.equal(arena, expected) and not torch.equal(arena, before)


def test_gather_dequantize_takes_a_bad_slot_as_absent():
    (codes, _, *book), kwargs = sample(gather_dequantize._sample(3, [0], 2, 8, 80, 6, 8, 10))
    bad = torch.tensor([1, 3, -5, 2], dtype=torch.int32)
    absent = torch.tensor([1, -1, -1, 2], dtype=torch.int32)
    actual = host.call("gather_dequantize", codes, bad, *book, **kwargs)
    expected = host.call("gather_dequantize", codes, absent, *book, **kwargs)
    assert torch.equal(actual, expected) and not actual[1:3].any() and actual[0].any()


def test_select_tokens_clamps_a_bad_length():
    (q, k, _), kwargs = sample(select_tokens._sample(2, 24, 4, 2, 64, 5, "received"))
    bad, clamped = (torch.tensor(n, dtype=torch.int32) for n in ([99, -3], [24, 0]))
    actual = host.call("select_tokens", q, k, bad, **kwargs)
    assert torch.equal(actual, host.call("select_tokens", q, k, clamped, **kwargs)) and (actual[1] == -1).all()


@pytest.mark.parametrize("op, case", [
    pytest.param(OPS[name], case, id=f"{name}-{case.id}") for name in CHECKED
    for case in OPS[name].bad_cases() if not case.fake
])  # fmt: skip
def test_debug_refuses_bad_values(op, case, monkeypatch):
    monkeypatch.setenv("M3_DEBUG", "1")
    args, kwargs = case.make()
    with pytest.raises(RuntimeError, match=case.match):
        host.call(op.name, *args, **kwargs)


@pytest.mark.parametrize("op, case", [
    pytest.param(OPS[name], case, id=f"{name}-{case.id}") for name in (*CHECKED, "vq_dequantize")
    for case in OPS[name].bad_cases() if case.fake
])  # fmt: skip
def test_refuses_bad_arguments(op, case):
    args, kwargs = case.make()
    with pytest.raises(RuntimeError, match=case.match):
        host.call(op.name, *args, **kwargs)


UNSUPPORTED = {
    "dim": ("select_tokens", select_tokens._sample(1, 8, 2, 1, 24, 2, "received"), "q: .* of 64, 80 or 128 .*, got 24"),
    "rows": ("select_tokens", select_tokens._sample(1, 1600, 2, 1, 64, 2, "exp"), "1600 rows of 64 values do not fit"),
    "odd-entries": ("vq_dequantize", vq_dequantize._sample((5,), 24, 4, 8, 4), "even number of values .*, got 3"),
    "parts": ("vq_dequantize", vq_dequantize._sample((5,), 256, 4, 128, 4), "at most 64 parts .*, got 128 of 256"),
    "rotation-dim": ("vq_dequantize", vq_dequantize._sample((5,), 40, 4, 4, 4), "rot: .* of 64, 80 or 128 .*, got 40"),
}


@pytest.mark.parametrize("name, make, reason", list(UNSUPPORTED.values()), ids=list(UNSUPPORTED))
def test_says_what_it_does_not_take(name, make, reason):
    args, kwargs = sample(make)
    with pytest.raises(RuntimeError, match=reason):
        host.call(name, *args, **kwargs)
