"""The CUDA kernels on a real GPU, at the head dimensions that are compiled: what the SIMT host runs without one."""

from __future__ import annotations

import pytest
import test_ops
import torch
from simt import cases
from simt.host import names

from memory3_kernels import _cuda, use_backend
from memory3_kernels._registry import OPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def grid():
    for name in names():
        for case in cases.cases(name):
            for dtype in (torch.bfloat16, torch.float16):
                yield pytest.param(OPS[name], case, dtype, id=f"{name}-{case.id}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("op, case, dtype", list(grid()))
def test_cuda_kernels_match_their_references(op, case, dtype):
    if _cuda.reason() or _cuda.device_refused(0):
        pytest.fail(_cuda.reason() or _cuda.device_refused(0))
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    args, kwargs = test_ops.place((args, kwargs), "device")
    with use_backend("cuda"):
        actual = test_ops.run(op, args, kwargs)
    test_ops.check(op, actual, before, kwargs, op.tolerance[dtype])


@pytest.mark.parametrize("name", names())
def test_calls_can_be_captured_in_a_graph(name):
    """The same result from a replayed graph, on new values in the same memory."""
    op, case = OPS[name], cases.cases(name)[0]
    if op.mutates:
        return
    args, kwargs = test_ops.place(test_ops.make(case, torch.bfloat16), "device")
    with use_backend("cuda"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            test_ops.run(op, args, kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = test_ops.run(op, args, kwargs)
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for made, wanted in zip(outputs, test_ops.run(op, args, kwargs), strict=True):
            assert torch.equal(made.nan_to_num(7.0), wanted.nan_to_num(7.0))
