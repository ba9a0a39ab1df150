"""CUDA tensors without a GPU: fake ones through dispatch, tracing and export, on any build of torch."""

from __future__ import annotations

import pytest
import test_ops
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple

OPS_BY_NAME = [pytest.param(op, id=name) for name, op in OPS.items()]
NAMESPACES = ("memory3", "memory3_cuda", "memory3_triton", "memory3_fallback")


def on_cuda(mode, value):
    """Fake tensors on cuda:0 with the shapes and strides of real ones."""

    def move(t: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0")

    return tree_map_only(Tensor, move, value)


def cases(op):
    return [case for case in op.cases() if not case.slow]


@pytest.mark.parametrize("op", OPS_BY_NAME)
def test_outputs_are_on_cuda(op):
    """Shapes and types of the reference's outputs, in every case."""
    for case in cases(op):
        args, kwargs = test_ops.make(case, op.dtypes[-1])
        wanted = as_tuple(op.reference(*test_ops.clone(args), **kwargs))
        mode = FakeTensorMode()
        with mode:
            outputs = as_tuple(op(*on_cuda(mode, args), **on_cuda(mode, kwargs)))
        assert len(outputs) == len(wanted)
        for made, real in zip(outputs, wanted, strict=True):
            assert (made.shape, made.dtype, str(made.device)) == (real.shape, real.dtype, "cuda:0"), case.id


@pytest.mark.parametrize("op", OPS_BY_NAME)
def test_twins_have_the_schema_of_their_op(op):
    for namespace in NAMESPACES[1:3]:
        twin = getattr(getattr(torch.ops, namespace), op.name).default
        assert str(twin._schema).removeprefix(namespace) == str(op.overload._schema).removeprefix("memory3")


@pytest.mark.parametrize("op", OPS_BY_NAME)
def test_traces_to_one_node(op):
    """torch.compile(fullgraph=True) of a call on CUDA tensors: the op itself is in the graph, nothing of its inside."""
    mode = FakeTensorMode()
    args, kwargs = on_cuda(mode, test_ops.make(cases(op)[0], op.dtypes[-1]))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with mode:
        torch.compile(op, fullgraph=True, backend=keep)(*args, **kwargs)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert op.overload in called


class Context:
    """What autograd hands to setup_context and backward; its own engine wants a driver for CUDA tensors."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_):
        pass

    def set_materialize_grads(self, _):
        pass


@pytest.mark.parametrize("op", [p for p in OPS_BY_NAME if p.values[0].backward is not None])
def test_gradients_are_on_cuda(op):
    for case in (case for case in cases(op) if case.grad):
        mode = FakeTensorMode()
        args, kwargs = on_cuda(mode, test_ops.make(case, op.dtypes[-1]))
        context = Context()
        context.needs_input_grad = tuple(i in case.grad for i in range(len(args)))
        with mode:
            outputs = op(*args, **kwargs)
            op.setup_context(context, args, kwargs, outputs) if kwargs else op.setup_context(context, args, outputs)
            grads = op.backward(context, *(torch.ones_like(o) for o in as_tuple(outputs)))
        for position in case.grad:
            made, wanted = grads[position], args[position]
            assert (made.shape, made.device) == (wanted.shape, wanted.device), f"{case.id}, argument {position}"


class Call(torch.nn.Module):
    def __init__(self, op, kwargs):
        super().__init__()
        self.op, self.kwargs = op, kwargs

    def forward(self, *args):
        return self.op.overload(*args, **self.kwargs)


@pytest.mark.parametrize("op", OPS_BY_NAME)
def test_exports(op):
    mode = FakeTensorMode()
    args, kwargs = on_cuda(mode, test_ops.make(cases(op)[0], op.dtypes[-1]))
    with mode, torch.no_grad():
        program = torch.export.export(Call(op, kwargs), args, strict=False)
    text = str(program.graph)
    assert f"memory3.{op.name}.default" in text
