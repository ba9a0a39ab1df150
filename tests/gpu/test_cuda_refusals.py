"""Calls that the CUDA kernels do not take: refused before anything is launched, with the reason, and handed on to the
next backend; and dry runs."""

from __future__ import annotations

import pytest
import test_ops
import torch
from simt import build, cases, host, ptx

from memory3_kernels import triton
from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple


@pytest.fixture(scope="module", autouse=True)
def loaded():
    host.load(build.build())


def decode(dtype=torch.bfloat16, dim=80):
    case = next(case for case in cases.cases("memory_decode", dim) if case.id == "split")
    return test_ops.make(case, dtype)


@pytest.mark.parametrize("dtype, dim, match", [
    (torch.float32, 80, "q: expected bfloat16 or float16 for the CUDA kernel"),
    (torch.bfloat16, 72, "expected a head dimension of 64, 80 or 128 for the CUDA kernel, got 72"),
])  # fmt: skip
def test_types_and_dimensions(dtype, dim, match):
    args, kwargs = decode(dtype, dim)
    with pytest.raises(RuntimeError, match=f"memory_decode: .*{match}"):
        host.call("memory_decode", *args, **kwargs)


def test_rows_that_are_not_at_multiples_of_16_bytes():
    args, kwargs = decode()
    wide = torch.zeros(*args[0].shape[:-1], 84, dtype=torch.bfloat16)
    wide[..., :80] = args[0]
    with pytest.raises(RuntimeError, match="q: expected rows at multiples of 16 bytes"):
        host.call("memory_decode", wide[..., :80], *args[1:], **kwargs)


def test_dry_run():
    """The same checks, and nothing is launched."""
    args, kwargs = decode()
    launches = []
    hook = ptx._HOOK(lambda *_: launches.append(1) or 0)
    host.library().simt_set_hook(hook)
    host.library().m3_cuda_dry_run(1)
    try:
        host.call("memory_decode", *args, **kwargs)
        assert not launches
        with pytest.raises(RuntimeError, match="expected bfloat16 or float16"):
            host.call("memory_decode", *decode(torch.float32)[0], **kwargs)
        host.library().m3_cuda_dry_run(0)
        host.call("memory_decode", *args, **kwargs)
        assert launches
    finally:
        host.library().m3_cuda_dry_run(0)
        host.library().simt_set_hook(ptx._HOOK())


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_what_is_refused_is_handed_on(name, monkeypatch):
    """float32 through the binding, arguments of every kind unpacked and packed again: what comes next is reached with
    the caller's arguments, or the CUDA kernel takes float32, too."""
    op, reached = OPS[name], []

    def next_one(*args, **kwargs):
        reached.append(True)
        return op.reference(*args, **kwargs)

    monkeypatch.setattr(triton, "implementation", lambda _: next_one)
    if triton.missing():
        pytest.skip(triton.missing())
    for case in list(cases.cases(name))[:4]:
        args, kwargs = test_ops.make(case, torch.float32)
        before = test_ops.clone(args)
        outputs = as_tuple(getattr(torch.ops.memory3_simt_or_else, name)(*args, **kwargs))
        outputs += tuple(args[i] for i in op.mutates)
        test_ops.check(op, outputs, before, kwargs, op.tolerance[torch.float32])
    takes_float32 = ("gather_dequantize", "gather_memory", "merge_attention_states", "scatter_memory", "vq_dequantize")
    assert reached or name in takes_float32
