"""The CUDA kernels on random calls (tests/simt/fuzz.py): on the SIMT host where M3_SIMT_LIBRARY names its library
(built with sanitizers, in a process that they were loaded into), else as nvcc's PTX in the PTX interpreter.

Run by `python -m bench gpu-proof`, stages fuzz and fuzz-ptx; M3_FUZZ: calls per op.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import test_ops
import torch
from simt import build, fuzz, host, ptx

from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple

LIBRARY = os.environ.get("M3_SIMT_LIBRARY")
COUNT = int(os.environ.get("M3_FUZZ", "20"))


@pytest.fixture(scope="module", autouse=True)
def loaded():
    if not LIBRARY and ptx.missing():
        pytest.skip(ptx.missing())
    host.load(Path(LIBRARY) if LIBRARY else build.build())


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("op", host.names())
def test_matches_reference(op, number):
    (case,) = list(fuzz.cases(op, number + 1))[-1:]
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    if LIBRARY:
        with host.schedule("random", seed=number):
            actual = as_tuple(host.call(op, *args, **kwargs))
    else:
        with ptx.running(op) as run:
            actual = as_tuple(host.call(op, *args, **kwargs))
        assert not [finding for _, result in run.results for finding in result.findings]
    actual += tuple(args[i] for i in OPS[op].mutates)
    test_ops.check(OPS[op], actual, before, kwargs, OPS[op].tolerance[dtype])
