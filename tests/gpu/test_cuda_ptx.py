"""nvcc's PTX, run by the PTX interpreter against the references: no out-of-bounds access, no read of what nobody wrote,
no race in shared memory, no use of an asynchronous copy under way; and the traffic.

By default the samples with a head dimension of 80 in bfloat16; M3_PROOF=full: all.
"""

from __future__ import annotations

import os

import pytest
import test_ops
import torch
from simt import build, cases, host, ptx, record_cases

from memory3_kernels._registry import OPS
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import merge_attention_states as merge
from memory3_kernels.ops.memory_decode import decode_cost
from memory3_kernels.testing.compare import as_tuple
from memory3_kernels.testing.cuda_limits import SHARED_LIMIT

FULL = os.environ.get("M3_PROOF") == "full"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    if ptx.missing():
        pytest.skip(ptx.missing())
    host.load(build.build())


def grid():
    for name in host.names():
        for case in cases.cases(name, None if FULL else 80):
            for dtype in (torch.bfloat16, torch.float16) if FULL else (torch.bfloat16,):
                yield pytest.param(name, case, dtype, id=f"{name}-{case.id}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("name, case, dtype", list(grid()))
def test_matches_reference(name, case, dtype):
    op = OPS[name]
    args, kwargs = test_ops.make(case, dtype)
    before = test_ops.clone(args)
    with ptx.running(name, one_shape=not FULL) as run:
        actual = as_tuple(host.call(name, *args, **kwargs))
    test_ops.check(op, actual + tuple(args[i] for i in op.mutates), before, kwargs, op.tolerance[dtype])
    for _, result in run.results:
        assert not result.findings
        assert result["shared_bytes"] <= min(SHARED_LIMIT.values())


def moved(run, apart: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes between the chip and its memory, were every byte moved once per launch; without the tensors `apart`."""
    named = {f"{t.data_ptr():x}" for t in apart}
    kept = [a for _, r in run.results for a in r["unique"]["allocations"] if a["name"] not in named]
    return sum(a["read_bytes"] + a["written_bytes"] for a in kept)


def assert_few_conflicts(run) -> None:
    """Shared memory is read and written in at most 1.1 times the passes that its bytes need."""
    for kernel, result in run.results:
        for kind in ("shared_load", "shared_store", "ldmatrix", "async_copy_shared"):
            passes, ideal = result[kind]["wavefronts"], result[kind]["ideal_wavefronts"]
            assert passes <= 1.1 * ideal, f"{kernel}: {kind} takes {passes} passes, {ideal} were possible"


DIMS = (64, 80, 128) if FULL else (80,)


def decode_shapes():
    """(sequences, heads, head dimension, context); M3_PROOF=full: with those that docs/ops quote."""
    small = ((4, (40, 8), 256), (1, (20, 4), 1024))
    found = [(batch, heads, dim, context) for batch, heads, context in small for dim in DIMS]
    quoted = [(32, (40, 8), 80, 256), (1, (32, 8), 128, 4096), (8, (32, 8), 128, 256)]
    for batch, heads, dim, context in found + (quoted if FULL else []):
        yield pytest.param(batch, heads, dim, context, id=f"batch{batch}-H{heads[0]}x{heads[1]}-D{dim}-ctx{context}")


def decode_spec(batch, heads, context, dim) -> samples.Spec:
    return samples.Spec(
        heads=heads, dim=dim, sequences=((1, context),) * batch, refs=5, tokens=8, slots=5 * batch, spare=0, arena=True
    )


@pytest.mark.parametrize("batch, heads, dim, context", list(decode_shapes()))
def test_decode_traffic(batch, heads, dim, context, record_property):
    """At most 1.15 times what has to be moved, in whole sectors; no detours in shared memory."""
    args, kwargs = samples.decode_sample(decode_spec(batch, heads, context, dim))(
        torch.bfloat16, torch.Generator().manual_seed(0)
    )
    with ptx.running("memory_decode", one_shape=not FULL) as run:
        host.call("memory_decode", *args, **kwargs)
    least = OPS["memory_decode"].cost(*args, **kwargs).bytes
    record_property("moved_bytes", moved(run))
    record_property("ratio", round(moved(run) / least, 3))
    assert moved(run) <= 1.15 * least
    assert all(result["async_copy"]["efficiency"] >= 0.9 for _, result in run.results)
    assert_few_conflicts(run)


@pytest.mark.parametrize("half_tables", (False, True))
@pytest.mark.parametrize("batch, heads, dim, context", list(decode_shapes()))
def test_coded_decode_traffic(batch, heads, dim, context, half_tables, record_property):
    """The same, with the paper's codes; the books are counted apart: at most what the tables and rotations hold."""
    args, kwargs = samples.coded_sample(decode_spec(batch, heads, context, dim), (14, 8, 10), half_tables)(
        torch.bfloat16, torch.Generator().manual_seed(0)
    )
    with ptx.running("memory_decode_coded", one_shape=not FULL) as run:
        host.call("memory_decode_coded", *args, **kwargs)
    books = tuple(t for t in args[12:] if t is not None)
    token_bytes = 2 * 14 * heads[1]
    least = decode_cost(args[0], args[1], args[3], args[5], args[8], args[9], token_bytes).bytes
    record_property("moved_bytes", moved(run, books))
    record_property("ratio", round(moved(run, books) / least, 3))
    record_property("book_bytes", moved(run) - moved(run, books))
    assert moved(run, books) <= 1.15 * least
    assert moved(run) - moved(run, books) <= OPS["memory_decode_coded"].cost(*args, **kwargs).bytes - least
    assert all(result["async_copy"]["efficiency"] >= 0.9 for _, result in run.results)
    assert_few_conflicts(run)


def test_merge_traffic():
    """Every byte once, in whole sectors."""
    args, kwargs = merge._sample(64, 40, 80)(torch.bfloat16, torch.Generator().manual_seed(0))
    with ptx.running("merge_attention_states", one_shape=not FULL) as run:
        host.call("merge_attention_states", *args, **kwargs)
    assert moved(run) == OPS["merge_attention_states"].cost(*args, **kwargs).bytes
    ((_, result),) = run.results
    assert result["global_load"]["efficiency"] >= 0.9 and result["global_store"]["efficiency"] >= 0.9


@pytest.mark.parametrize("stream", [pytest.param(s, id=s.id) for s in record_cases.streams(DIMS)])
def test_record_traffic(stream, record_property):
    """The ops that write records and decode coded ones move what their tile schedule says, tables of a book apart, in
    whole sectors; no detours in shared memory."""
    args, kwargs = stream.case.make(torch.bfloat16, torch.Generator().manual_seed(0))
    with ptx.running(stream.op, one_shape=not FULL) as run:
        host.call(stream.op, *args, **kwargs)
    tables = args[-3:] if stream.op.endswith("dequantize") else ()
    least = stream.least(*args, **kwargs)
    record_property("moved_bytes", moved(run, tuple(t for t in tables if t is not None)))
    assert moved(run, tuple(t for t in tables if t is not None)) <= 1.15 * least
    ((_, result),) = run.results
    for kind in stream.kinds:
        assert result[kind]["efficiency"] >= 0.9, f"{kind}: {result[kind]}"
    assert sum(32 * result[kind]["sectors"] for kind in stream.kinds) <= 1.15 * least
    assert_few_conflicts(run)
