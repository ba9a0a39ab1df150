"""Every op x backend x SIMD level x case, from the contracts alone. Adding an op adds no test code here.

The native library must load wherever it can be built; `M3_NATIVE=0` runs the same file on the references. Where there
is a GPU, everything runs there too: as dispatched (CUDA kernels and what serves in their place), and on Triton alone.
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import memory3_kernels  # noqa: F401  (registers the ops)
from memory3_kernels import _load, triton
from memory3_kernels._backends import choose, use_backend
from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple, assert_close, widen

NATIVE = os.environ.get("M3_NATIVE", "1") != "0"
LEVELS = list(_load.SIMD_LEVELS)
ON_DEVICE = ["device", "device-triton"] if torch.cuda.is_available() else []


def generator(case_id: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(case_id.encode()))


def make(case, dtype):
    return case.make(dtype, generator(case.id))


def grid(with_dtypes=True, gradients=False):
    return list(_grid(with_dtypes, gradients))


def _grid(with_dtypes, gradients):
    for op in OPS.values():
        for case in op.cases():
            if case.slow or (gradients and not (case.grad and op.backward)):
                continue
            for dtype in op.dtypes if with_dtypes else op.dtypes[:1]:
                name = str(dtype).removeprefix("torch.")
                yield pytest.param(op, case, dtype, id=f"{op.name}-{case.id}-{name}")


def bad_grid():
    return [pytest.param(op, bad, id=f"{op.name}-{bad.id}") for op in OPS.values() for bad in op.bad_cases()]


@pytest.fixture(params=["reference", *(f"native-{level}" for level in LEVELS), *ON_DEVICE])
def backend(request):
    """Forces one backend and SIMD level for a test; `device`: what the dispatcher picks for tensors on a GPU."""
    if request.param == "reference":
        with use_backend("reference"):
            yield "reference"
        return
    if request.param == "device":
        yield request.param
        return
    if request.param == "device-triton":
        op = request.getfixturevalue("op")
        if not triton.has_kernel(op.name):
            pytest.skip(f"{op.name} has no Triton kernel")
        with use_backend("triton"):
            yield request.param
        return
    if not NATIVE:
        pytest.skip("M3_NATIVE=0: this run covers the references")
    level = request.param.removeprefix("native-")
    if level not in _load.available_simd_levels():
        pytest.skip(f"this CPU has no {level}")
    with use_backend("native"), _load.use_simd_level(level):
        yield request.param


def clone(value):
    """A deep copy of tensors inside args; views keep their strides."""
    if isinstance(value, Tensor):
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return copy.copy_(value) if 0 not in value.stride() else value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(clone(v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(clone(v) for v in value)
    return {k: clone(v) for k, v in value.items()} if isinstance(value, dict) else value


def place(value, backend):
    """Arguments where the backend runs: as they are, or on the GPU, with their strides."""
    if not backend.startswith("device"):
        return value

    def move(t: Tensor) -> Tensor:
        if 0 in t.stride():
            return t.cuda()
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)

    return tree_map_only(Tensor, move, value)


def run(op, args, kwargs):
    """Outputs, and for an op that mutates, the arguments it wrote to."""
    outputs = as_tuple(op(*args, **kwargs))
    return outputs + tuple(args[i] for i in op.mutates)


def expected(op, args, kwargs):
    args = tuple(widen(a) for a in clone(args))
    outputs = as_tuple(op.reference(*args, **widen(kwargs)))
    return outputs + tuple(args[i] for i in op.mutates)


def check(op, actual, args, kwargs, tolerance):
    wanted = expected(op, args, kwargs)
    actual = tuple(a.cpu() for a in actual)
    if op.compare is not None:
        return op.compare(actual, wanted, args, kwargs, tolerance)
    assert len(actual) == len(wanted)
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert_close(a, w, tolerance, f"{op.name} output {i}")


def strided(value):
    """A view with the same content: rows of a wider buffer whose gaps are NaN (the last stride stays 1)."""
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
        return value
    *lead, last = value.shape
    wide = torch.full((*lead, last + 8), torch.nan, dtype=value.dtype)
    view = wide[..., :last]
    view.copy_(value)
    return view


def test_native_library_is_loaded():
    if not NATIVE:
        pytest.skip("M3_NATIVE=0: this run covers the references")
    assert _load.native_reason() is None
    for name in OPS:
        keys = torch._C._dispatch_dump(f"memory3::{name}")
        assert "CPU: " in keys, f"memory3::{name} has no native kernel"


@pytest.mark.parametrize("op, case, dtype", grid())
def test_matches_reference(op, case, dtype, backend):
    args, kwargs = make(case, dtype)
    before = clone(args)
    args = place(args, backend)
    if backend != "device":
        assert choose(op, args) == backend.removeprefix("device-").partition("-")[0]
    actual = run(op, args, kwargs)
    check(op, actual, before, kwargs, case.slack * op.tolerance[dtype])
    for i, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor) and i not in op.mutates:
            assert torch.equal(a.cpu().nan_to_num(), b.nan_to_num()), f"{op.name} wrote to argument {i}"


@pytest.mark.parametrize("op, case, dtype", grid())
def test_strided_views(op, case, dtype, backend):
    args, kwargs = make(case, dtype)
    before = clone(args)
    actual = run(op, place(tuple(strided(a) for a in args), backend), kwargs)
    check(op, actual, before, kwargs, case.slack * op.tolerance[dtype])


@pytest.mark.parametrize("op, case, dtype", grid(with_dtypes=False))
def test_repeats_bit_for_bit(op, case, dtype, backend):
    args, kwargs = make(case, dtype)
    first, second = (run(op, place(clone(args), backend), kwargs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("op, bad", bad_grid())
def test_refuses_bad_arguments(op, bad, backend):
    args, kwargs = bad.make()
    if backend.startswith("device"):
        if not bad.fake:
            return  # values of index tensors stay on the GPU: a bad one counts as absent
        args, kwargs = place((args, kwargs), backend)
    with pytest.raises(RuntimeError, match=bad.match):
        op(*args, **kwargs)
    if bad.fake:
        mode = torch._subclasses.FakeTensorMode()
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        with mode, pytest.raises(RuntimeError, match=bad.match):
            op.overload(*args, **kwargs)


def with_gradients(args, positions):
    return tuple(a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args))


def gradients(function, args, kwargs, positions):
    """d(sum of outputs * fixed random weights) / d(args at positions)."""
    args = with_gradients(args, positions)
    outputs = [o for o in as_tuple(function(*args, **kwargs)) if o.is_floating_point() and o.requires_grad]
    draw = torch.Generator().manual_seed(1)
    loss = sum(
        (
            o.double().masked_fill(~o.isfinite(), 0).cpu() * torch.randn(o.shape, generator=draw, dtype=torch.float64)
        ).sum()
        for o in outputs
    )
    grads = torch.autograd.grad(loss, [args[i] for i in positions], allow_unused=True)
    return [torch.zeros_like(args[i]) if g is None else g for i, g in zip(positions, grads, strict=True)]


@pytest.mark.parametrize("op, case, dtype", grid(gradients=True))
def test_gradients_match_reference(op, case, dtype, backend):
    args, kwargs = make(case, dtype)
    function = op.overload if backend.startswith("native") else op
    actual = gradients(function, place(args, backend), kwargs, case.grad)
    wide = gradients(op.reference, tuple(widen(a) for a in args), widen(kwargs), case.grad)
    for i, (a, w) in enumerate(zip(actual, wide, strict=True)):
        assert_close(a.cpu(), w, 4 * op.tolerance[dtype], f"{op.name} gradient of argument {case.grad[i]}")


@pytest.mark.parametrize("op, case, dtype", grid(with_dtypes=False, gradients=True))
def test_gradcheck(op, case, dtype):
    """The reference's gradient against finite differences, in float64; and, where no native kernel stands in the
    way, the registered formula too."""
    args, kwargs = make(case, torch.float64)
    if sum(args[i].numel() for i in case.grad) > 1000:
        case_args = with_gradients(args, case.grad)
        assert torch.autograd.gradcheck(
            lambda *a: [o for o in as_tuple(op.reference(*a, **kwargs)) if o.requires_grad],
            case_args, fast_mode=True)  # fmt: skip
    else:
        assert torch.autograd.gradcheck(
            lambda *a: [o for o in as_tuple(op.reference(*a, **kwargs)) if o.requires_grad],
            with_gradients(args, case.grad), fast_mode=False)  # fmt: skip
    if not NATIVE:
        assert torch.autograd.gradcheck(
            lambda *a: [o for o in as_tuple(op.overload(*a, **kwargs)) if o.requires_grad],
            with_gradients(args, case.grad), fast_mode=True)  # fmt: skip


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_gradient_is_refused_where_there_is_none(op):
    if op.backward is not None:
        return
    args, kwargs = make(next(iter(op.cases())), torch.float32)
    floating = tuple(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
    for position in floating:
        with pytest.raises(RuntimeError, match=f"{op.name} has no gradient|leaf Variable"):
            op(*with_gradients(args, (position,)), **kwargs)


@pytest.mark.parametrize("op, case, dtype", grid(with_dtypes=False))
def test_opcheck(op, case, dtype):
    args, kwargs = make(case, dtype)
    if op.backward is not None:
        args = with_gradients(args, case.grad)
    if any(isinstance(a, Tensor) and a.is_floating_point() and a.isnan().any() for a in args):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # NaN == NaN is false in the fourth
    else:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_compiles_in_one_graph(op):
    """torch.compile(fullgraph=True) every case, equal to eager bit for bit."""
    for case in op.cases():
        if case.slow:
            continue
        torch._dynamo.reset()
        args, kwargs = make(case, torch.float32)
        eager = run(op, clone(args), kwargs)
        compiled_args = clone(args)
        outputs = as_tuple(torch.compile(op, fullgraph=True, backend="aot_eager")(*compiled_args, **kwargs))
        for a, b in zip(eager, outputs + tuple(compiled_args[i] for i in op.mutates), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), case.id
