"""The Triton kernels on Triton's interpreter: every op x case x type against the float64 reference, from the contracts.

Run by test_triton_interpreter.py in a process of its own, as the interpreter is chosen when a kernel is imported:
    TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted.py
"""

from __future__ import annotations

import os

import pytest
import test_ops
import torch
from torch import Tensor

from memory3_kernels import triton, use_backend
from memory3_kernels.testing.compare import assert_close, widen
from memory3_kernels.testing.triton_interpreter import install

if not triton.interpreted():
    raise RuntimeError("set TRITON_INTERPRET=1 before pytest starts")
install()


def grid(with_dtypes=True, gradients=False):
    return [p for p in test_ops.grid(with_dtypes, gradients) if triton.has_kernel(p.values[0].name)]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("op, case, dtype", grid())
def test_matches_reference(op, case, dtype):
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    actual = test_ops.run(op, args, kwargs)
    test_ops.check(op, actual, before, kwargs, op.tolerance[dtype])
    for i, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor) and i not in op.mutates:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{op.name} wrote to argument {i}"


@pytest.mark.parametrize("op, case, dtype", grid(with_dtypes=False))
def test_strided_views(op, case, dtype):
    args, kwargs = test_ops.make(case, torch.bfloat16)
    before = test_ops.clone(args)
    actual = test_ops.run(op, tuple(test_ops.strided(a) for a in args), kwargs)
    test_ops.check(op, actual, before, kwargs, op.tolerance[torch.bfloat16])


@pytest.mark.parametrize("op, case, dtype", grid(gradients=True))
def test_gradients_match_reference(op, case, dtype):
    args, kwargs = test_ops.make(case, dtype)
    actual = test_ops.gradients(op, args, kwargs, case.grad)
    wide = test_ops.gradients(op.reference, tuple(widen(a) for a in args), widen(kwargs), case.grad)
    for i, (a, w) in enumerate(zip(actual, wide, strict=True)):
        assert_close(a, w, 4 * op.tolerance[dtype], f"{op.name} gradient of argument {case.grad[i]}")


@pytest.mark.parametrize("op, bad", [p for p in test_ops.bad_grid() if triton.has_kernel(p.values[0].name)])
def test_refuses_bad_arguments(op, bad, monkeypatch):
    """Shapes and types always, values of index tensors where M3_DEBUG=1 asks for it."""
    if not bad.fake:
        monkeypatch.setitem(os.environ, "M3_DEBUG", "1")
    args, kwargs = bad.make()
    with pytest.raises(RuntimeError, match=bad.match):
        op(*args, **kwargs)
