"""The CUDA kernels on the SIMT host: every op x case x schedule against the float64 reference.

Run by test_cuda_simt.py in a process of its own, which AddressSanitizer must have been loaded into from the start:
    M3_SIMT_LIBRARY=build/simt/plain/libm3_simt.so python -m pytest tests/gpu/simulated.py
By default each case in one type and two schedules, by turns; M3_PROOF=full: both types in all schedules.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import test_ops
import torch
from simt import cases, host
from torch import Tensor

from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple

FULL = os.environ.get("M3_PROOF") == "full"
host.load(Path(os.environ["M3_SIMT_LIBRARY"]))


def grid():
    for name in filter(host.has_kernel, host.names()):
        for i, case in enumerate(cases.cases(name)):
            dtypes = (torch.bfloat16, torch.float16) if FULL else ((torch.bfloat16, torch.float16)[i % 2],)
            for dtype, order in itertools.product(dtypes, host.ORDERS if FULL else (host.ORDERS[i % 5], "random")):
                kind = str(dtype).removeprefix("torch.")
                yield pytest.param(OPS[name], case, dtype, order, id=f"{name}-{case.id}-{kind}-{order}")


@pytest.mark.parametrize("op, case, dtype, order", list(grid()))
def test_matches_reference(op, case, dtype, order):
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    with host.schedule(order, seed=1):
        actual = as_tuple(host.call(op.name, *args, **kwargs))
    actual += tuple(args[i] for i in op.mutates)
    test_ops.check(op, actual, before, kwargs, op.tolerance[dtype])
    for i, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor) and i not in op.mutates:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{op.name} wrote to argument {i}"
