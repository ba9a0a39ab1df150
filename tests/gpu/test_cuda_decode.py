"""memory_decode and memory_decode_coded on CUDA where no sample of the contracts goes: caches as serving engines keep
them, wrong indices, M3_DEBUG=1; on the SIMT host, and from nvcc's PTX where that can be run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import test_ops
import torch
from simt import build, host, ptx

from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples

DTYPE = torch.bfloat16
KV_LEN, TABLE, MEM_SLOT, MEM_LEN, HEAD_MAP = 3, 4, 8, 9, 11
SPEC = samples.Spec(
    heads=(6, 3), dim=80, sequences=((1, 40), (3, 64)), tokens=8, refs=3, slots=6, lengths=(8, 8, 8, 8, 8, 8), spare=0,
    head_map=(1, 0, 2),
)  # fmt: skip
OPS_AND_SAMPLES = {
    "memory_decode": samples.decode_sample,
    "memory_decode_coded": lambda spec: samples.coded_sample(spec, (6, 8, 10)),
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    host.load(build.build())


@pytest.fixture(params=["host", "ptx"])
def call(request):
    """host.call, on the SIMT host or as PTX."""
    if request.param == "ptx" and ptx.missing():
        pytest.skip(ptx.missing())

    def run(op, args, kwargs):
        with ptx.running(op, one_shape=True) if request.param == "ptx" else nullcontext():
            return host.call(op, *args, **kwargs)

    return run


def sample(op, spec=SPEC):
    args, kwargs = OPS_AND_SAMPLES[op](spec)(DTYPE, torch.Generator().manual_seed(1))
    return list(args), kwargs


def changed(args, place, value):
    """The arguments with another value in one of the index tensors: (position, index)."""
    position, index = place
    args = list(args)
    args[position] = args[position].clone()
    args[position][index] = value
    return args


# What is wrong, and what it must be taken for.
WRONG = {
    "slot-high": ((MEM_SLOT, (0, 1)), 6, -1),
    "slot-low": ((MEM_SLOT, (1, 0)), -7, -1),
    "slot-highest": ((MEM_SLOT, (0, 0)), 2**31 - 1, -1),
    "length-high": ((MEM_LEN, (2,)), 9, 8),
    "length-low": ((MEM_LEN, (2,)), -1, 0),
    "head-high": ((HEAD_MAP, (1,)), 3, -1),
    "head-low": ((HEAD_MAP, (1,)), -2, -1),
    "kv_len-high": ((KV_LEN, (1,)), 10**6, 64),
    "kv_len-low": ((KV_LEN, (0,)), -5, 0),
}


@pytest.mark.parametrize("place, wrong, meant", list(WRONG.values()), ids=list(WRONG))
@pytest.mark.parametrize("op", list(OPS_AND_SAMPLES))
def test_wrong_index_counts_as_absent(op, place, wrong, meant, call):
    args, kwargs = sample(op)
    found = call(op, changed(args, place, wrong), kwargs)
    expected = call(op, changed(args, place, meant), kwargs)
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("page", [-1, 7, 2**31 - 1])
def test_page_that_does_not_exist_holds_nothing(page, call):
    """One new token sees every key: the result is that of a cache without the page."""
    args, kwargs = sample("memory_decode", replace(SPEC, sequences=((1, 100),), page=16))
    q, k, v, _, table, *rest = args
    kept = [p for i, p in enumerate(table[0, :7].tolist()) if i != 2]
    without = (q, *(c[kept].flatten(0, 1)[None] for c in (k, v)), torch.tensor([84], dtype=torch.int32), None, *rest)
    expected = OPS["memory_decode"].reference(*without, **kwargs)
    found = call("memory_decode", changed(args, (TABLE, (0, 2)), page), kwargs)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=2e-2, atol=4e-3)


def vllm_nhd(pages, page, heads, dim):
    both = torch.randn(2, pages, page, heads, dim).to(DTYPE)
    return both[0], both[1]


def vllm_hnd(pages, page, heads, dim):
    both = torch.randn(2, pages, heads, page, dim).to(DTYPE).transpose(2, 3)
    return both[0], both[1]


def flashinfer_nhd(pages, page, heads, dim):
    both = torch.randn(pages, 2, page, heads, dim).to(DTYPE)
    return both[:, 0], both[:, 1]


def flashinfer_hnd(pages, page, heads, dim):
    both = torch.randn(pages, 2, heads, page, dim).to(DTYPE).transpose(2, 3)
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("layout", [vllm_nhd, vllm_hnd, flashinfer_nhd, flashinfer_hnd])
def test_caches_of_serving_engines(layout, page, call):
    torch.manual_seed(2)
    args, kwargs = sample("memory_decode", replace(SPEC, page=page))
    args[1:3] = layout(*args[1].shape)
    found = call("memory_decode", args, kwargs)
    op = OPS["memory_decode"]
    test_ops.check(op, tuple(found), tuple(args), kwargs, op.tolerance[DTYPE])


def bad_cases():
    for name in (*OPS_AND_SAMPLES, "merge_attention_states"):
        for bad in OPS[name].bad_cases():
            yield pytest.param(name, bad, id=f"{name}-{bad.id}")


@pytest.mark.parametrize("name, bad", list(bad_cases()))
def test_refuses_bad_arguments(name, bad, monkeypatch):
    """Shapes and types always, values of index tensors where M3_DEBUG=1 asks for it."""
    if not bad.fake:
        monkeypatch.setenv("M3_DEBUG", "1")
    args, kwargs = bad.make()
    with pytest.raises(RuntimeError, match=bad.match):
        host.call(name, *args, **kwargs)


@pytest.mark.parametrize("op", list(OPS_AND_SAMPLES))
def test_debug_mode_takes_good_values(op, monkeypatch):
    args, kwargs = sample(op)
    plain = host.call(op, *args, **kwargs)
    monkeypatch.setenv("M3_DEBUG", "1")
    for a, e in zip(host.call(op, *args, **kwargs), plain, strict=True):
        assert torch.equal(a, e)
