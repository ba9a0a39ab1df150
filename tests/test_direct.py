"""Calls past the dispatcher: the same results as through it, and through it whatever is not plain."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import test_ops
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.dispatch import complete
from memory3_kernels import _load, gather_memory, scatter_memory, use_backend
from memory3_kernels._registry import OPS

if os.environ.get("M3_NATIVE", "1") == "0":
    pytest.skip("M3_NATIVE=0: this run covers the references", allow_module_level=True)

GATHER = OPS["gather_memory"]


def gather_args(**options) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (torch.arange(2 * 6 * 3 * 8, dtype=torch.float32, **options).view(2, 6, 3, 8) + i for i in range(2))
    return k, v, torch.tensor([[[0, 5], [1, 2], [3, 4]]] * 2, dtype=torch.int32)


def tensors(results) -> list[Tensor]:
    return [t for t in tree_leaves(results) if isinstance(t, Tensor)]


def same(a, b) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.contiguous().flatten().view(torch.uint8)  # a NaN equals itself

    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in pairs)


def test_it_is_there():
    assert _load.direct_reason() is None


@pytest.mark.parametrize("op, case, dtype", test_ops.grid())
def test_results_are_the_dispatchers(op, case, dtype):
    made = test_ops.make(case, dtype)
    args, args_too = (complete(op, *test_ops.clone(made)) for _ in range(2))
    direct = op.direct(*args)
    assert direct is not NotImplemented
    dispatched = op.forward(*args_too)
    assert same(direct, dispatched)
    assert same([args[i] for i in op.mutates], [args_too[i] for i in op.mutates])


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_results_are_tensors_like_others(op):
    args = complete(op, *next(iter(op.cases())).make(op.dtypes[0], torch.Generator().manual_seed(1)))
    results = op.direct(*args)
    assert type(results) is type(op.forward(*args))
    for result in tensors(results):
        assert type(result) is Tensor and result.is_contiguous() and result.data_ptr() % 64 == 0
        assert result.is_leaf and not result.requires_grad and not result.is_inference()
        assert result._version == 0
        again = result.clone()
        assert same(again, result) and same(result.add_(0), again)
    with torch.inference_mode():
        assert all(t.is_inference() for t in tensors(op.direct(*args)))


def test_a_result_outlives_everything():
    results = [GATHER.direct(*gather_args()) for _ in range(100)]
    wanted = GATHER.reference(*gather_args())
    results = [r[1:] for r in results]  # views keep the memory alive
    assert all(torch.equal(r, wanted[1:]) for r in results)


class Sub(Tensor):
    pass


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = str(func)
        return func(*args, **(kwargs or {}))


class SeeingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = True
        return func(*args, **(kwargs or {}))


def test_what_is_not_plain_is_refused():
    k, v, index = gather_args()
    assert GATHER.direct(k, v, index) is not NotImplemented
    assert GATHER.direct(k, v) is NotImplemented
    assert GATHER.direct(k, v, index, index) is NotImplemented
    assert GATHER.direct(k, v, slots=index) is NotImplemented
    assert GATHER.direct(k, v, index=index) is not NotImplemented
    assert GATHER.direct(k, v, None) is NotImplemented
    assert GATHER.direct(k, v, index.tolist()) is NotImplemented
    assert GATHER.direct(k.double(), v.double(), index) is NotImplemented
    assert GATHER.direct(k, v, index.long()) is NotImplemented  # an error: the dispatcher says which
    assert GATHER.direct(k.to("meta"), v, index) is NotImplemented
    assert GATHER.direct(k.as_subclass(Sub), v, index) is NotImplemented
    assert GATHER.direct(torch.nn.Parameter(k, requires_grad=False), v, index) is not NotImplemented
    assert GATHER.direct(k.transpose(1, 2), v, index) is NotImplemented  # a shape the op does not take


def test_gradients_take_the_dispatcher():
    k, v, index = gather_args(requires_grad=True)
    assert GATHER.direct(k, v, index) is NotImplemented
    assert gather_memory(k, v, index).requires_grad
    with torch.no_grad():
        assert GATHER.direct(k, v, index) is not NotImplemented
    assert torch.func.vmap(lambda x: x + 1)(k).requires_grad
    x = gather_args()

    def refused(t):
        assert GATHER.direct(t, t, x[2]) is NotImplemented
        return t.sum()

    torch.func.grad(refused)(x[0])


@pytest.mark.parametrize("mode", [Seeing, SeeingFunctions])
def test_modes_see_the_call(mode):
    with mode() as seeing:
        gather_memory(*gather_args())
        seeing.seen = None
        assert GATHER.direct(*gather_args()) is NotImplemented
        gather_memory(*gather_args())
        assert seeing.seen


def test_a_profiler_sees_the_call():
    with torch.profiler.profile() as profile:
        gather_memory(*gather_args())
    assert any("gather_memory" in event.key for event in profile.key_averages())


def test_negated_views_are_resolved():
    k, v, index = gather_args()
    negated = torch.complex(k, -v).conj().imag
    assert negated.is_neg() and torch.equal(negated, v)
    assert torch.equal(gather_memory(k, negated, index), gather_memory(k, v, index))


def test_what_is_written_to_has_a_new_version():
    records = GATHER.reference(*gather_args())
    arena = torch.zeros(4, *records.shape[1:])
    scatter_memory(arena, records, torch.tensor([3, 1], dtype=torch.int32))
    assert arena._version == 1 and torch.equal(arena[3], records[0])
    with torch.inference_mode():
        arena = torch.zeros(4, *records.shape[1:])
        scatter_memory(arena, records, torch.tensor([3, 1], dtype=torch.int32))
    assert torch.equal(arena[1], records[1])


def test_threads_do_not_disturb_each_other():
    wanted = GATHER.reference(*gather_args())
    wrong = []

    def work():
        for i in range(500):
            # Every other call is refused and takes the dispatcher.
            args = gather_args(requires_grad=bool(i % 2))
            if not torch.equal(gather_memory(*args), wanted):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_module_calls_take_the_dispatcher():
    code = (
        "import sys; sys.modules['memory3_kernels._direct'] = None\n"
        "import torch, memory3_kernels\n"
        "from memory3_kernels import _load, gather_memory\n"
        "assert 'ImportError' in _load.direct_reason() or 'ModuleNotFound' in _load.direct_reason()\n"
        "k = torch.ones(1, 4, 2, 8); print(gather_memory(k, k, torch.zeros(1, 2, 3, dtype=torch.int32)).shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "torch.Size([1, 2, 2, 3, 8])"


def test_another_exchange_table_is_refused():
    with mock.patch.object(_load, "_direct_reason", _load.direct_reason()):
        with mock.patch.object(torch.Tensor, "__dlpack_c_exchange_api__", object()):
            _load._connect_direct()
            assert _load.direct_reason() is not None
        _load._connect_direct()
        assert _load.direct_reason() is None


def test_arguments_by_position_and_by_name():
    select = OPS["select_tokens"]
    args, named = next(iter(select.cases())).make(torch.float32, torch.Generator().manual_seed(1))
    values = complete(select, args, named)
    wanted = select(*args, **named)
    assert same(select(*values), wanted)
    assert same(select(*args, **dict(reversed(named.items()))), wanted)
    with use_backend("reference"):
        assert select(*values).shape == wanted.shape
    doubled = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)
    assert select(*doubled).shape == wanted.shape  # no kernel takes float64: the reference
    for wrong in (
        lambda: select(*values, 1),
        lambda: select(*values, rule="causal"),
        lambda: select(*args, **named, x=1),
    ):
        for backend in (None, "reference"):
            with pytest.raises((TypeError, RuntimeError)), use_backend(backend) if backend else nullcontext():
                wrong()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_records_the_call():
    traced = torch.jit.trace(lambda k, v, index: gather_memory(k, v, index) * 2, gather_args())
    assert "gather_memory" in str(traced.graph)
    k, v, index = gather_args()
    assert torch.equal(traced(v, k, index), gather_memory(v, k, index) * 2)
