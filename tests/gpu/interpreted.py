"""The Triton kernels on Triton's interpreter: ops x cases x types against the float64 reference, from the contracts.

Run by test_triton_interpreter.py in a process of its own, as the interpreter is chosen when a kernel is imported:
    TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted.py
By default every case once, in one type after the other, and some of them on strided views; M3_PROOF=full: every case in
every type, and on strided views in one.
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
from memory3_kernels.triton import _heuristics

if not triton.interpreted():
    raise RuntimeError("set TRITON_INTERPRET=1 before pytest starts")
install()

FULL = os.environ.get("M3_PROOF") == "full"
LONG = ("received-N2_T40_H6-2_D64_K8", "exp-N2_T40_H6-2_D64_K8", "causal-group5_T70_D80", "received-twins_T32")


def grid(every: int = 1, gradients: bool = False, types: bool = False) -> list:
    """(op, case, type): of each op one case in `every`, in one type by turns, or in all `types`."""
    found = [p for p in test_ops.grid(gradients=gradients) if triton.has_kernel(p.values[0].name)]
    if types:
        return found
    cases: dict[tuple, list] = {}
    for p in found:
        cases.setdefault((p.values[0].name, p.values[1].id), []).append(p)
    return [by_type[i % len(by_type)] for i, by_type in enumerate(cases.values()) if i % every == 0]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("op, case, dtype", grid(types=FULL))
def test_matches_reference(op, case, dtype):
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    actual = test_ops.run(op, args, kwargs)
    test_ops.check(op, actual, before, kwargs, op.tolerance[dtype])
    for i, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor) and i not in op.mutates:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{op.name} wrote to argument {i}"


@pytest.mark.parametrize("op, case, dtype", grid(every=1 if FULL else 4))
def test_strided_views(op, case, dtype):
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    actual = test_ops.run(op, tuple(test_ops.strided(a) for a in args), kwargs)
    test_ops.check(op, actual, before, kwargs, op.tolerance[dtype])


@pytest.mark.parametrize("op, case, dtype", grid(every=4))
def test_repeats_bit_for_bit(op, case, dtype):
    args, kwargs = test_ops.make(case, dtype)
    first, second = (test_ops.run(op, test_ops.clone(args), kwargs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("op, case, dtype", grid(gradients=True, types=FULL))
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


@pytest.mark.parametrize("op, case, dtype", [p for p in grid(types=FULL) if p.values[1].id in LONG])
def test_select_tokens_in_two_passes(op, case, dtype, monkeypatch):
    """References longer than a tile of keys: as if a tile had 16."""
    tile = _heuristics.SelectTile(rows=64, keys=16, whole=False, warps=8, stages=2)
    monkeypatch.setattr(_heuristics, "select_tile", lambda *sizes: tile)
    args, kwargs = test_ops.make(case, dtype)
    test_ops.check(op, test_ops.run(op, args, kwargs), args, kwargs, op.tolerance[dtype])
