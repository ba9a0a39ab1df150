"""Every op x backend x shape on a GPU, and its peers: gated by correctness, timed, beside its prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from memory3_kernels import use_backend
from memory3_kernels._registry import OPS, Op
from memory3_kernels.testing.compare import as_tuple, assert_close, widen

from . import roofline, shapes
from .ceilings import Ceilings
from .clock import Clock
from .devices import Device
from .peers import PEERS

BACKENDS = ("cuda", "triton", "reference")
BATCHES, CONTEXTS = (1, 8, 32, 128), (256, 1024, 4096)  # of the decode table
REFERENCE_FLOPS = 1 << 35  # the reference holds whole score matrices: beyond this it is left out
PEER_TOLERANCE = 2e-2


def small(shape: shapes.Shape) -> shapes.Shape:
    """What the gate runs: two sequences, a short context; heads and head dimension are the shape's."""
    return replace(shape, batch=2, context=min(shape.context, 256))


def gate(op: Op, backend: str, shape: shapes.Shape, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with `backend` at (a small form of) the shape against float64, or None."""
    torch.manual_seed(0)
    args, kwargs = shapes.make(op.name, small(shape), dtype, device)
    wide = tuple(widen(a) for a in args)
    try:
        expected = as_tuple(op.reference(*wide, **widen(kwargs))) + tuple(wide[i] for i in op.mutates)
        with use_backend(backend):
            actual = as_tuple(op(*args, **kwargs)) + tuple(args[i] for i in op.mutates)
        if op.compare is not None:
            op.compare(tuple(a.cpu() for a in actual), tuple(e.cpu() for e in expected), _cpu(args), kwargs,
                       op.tolerance[dtype])  # fmt: skip
        else:
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                assert_close(a, e, op.tolerance[dtype], f"output {i}")
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def _cpu(args: tuple) -> tuple:
    return tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)


def peer_gate(op: Op, make: Callable, shape: shapes.Shape, dtype: torch.dtype, device: str) -> str | None:
    torch.manual_seed(0)
    args, kwargs = shapes.make(op.name, small(shape), dtype, device)
    try:
        peer = make(*args, **kwargs)
        wide = tuple(widen(a) for a in args)
        wanted, found = as_tuple(op.reference(*wide, **widen(kwargs)))[0], peer.result(peer.call())
        if op.compare is not None:  # a choice: which of two near ties is taken says nothing
            op.compare((found.cpu(),), (wanted.cpu(),), _cpu(args), kwargs, PEER_TOLERANCE)
        else:
            assert_close(found, wanted, PEER_TOLERANCE, make.__name__)
    except Exception as error:  # a library of somebody else's: whatever it raises is its refusal
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def arms(op: Op, shape: shapes.Shape, dtype, device: str, only: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Names of what to time, each with what stands in its way."""
    too_much = roofline.cost_of(op.name, shape).flops > REFERENCE_FLOPS
    for backend in BACKENDS:
        if (not only or backend in only) and not (backend == "reference" and too_much):
            yield backend, gate(op, backend, shape, dtype, device)
    for make in PEERS.get(op.name, ()):
        if not only or make.__name__ in only:
            yield make.__name__, peer_gate(op, make, shape, dtype, device)


def call_of(op: Op, name: str, args: tuple, kwargs: dict) -> Callable[[], object]:
    if name in BACKENDS:
        return lambda: op(*args, **kwargs)
    (make,) = (make for make in PEERS[op.name] if make.__name__ == name)
    return make(*args, **kwargs).call


def measure(
    op_name: str, shape: shapes.Shape, clock: Clock, known: Device | None, rounds: int = 30,
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda", only: tuple[str, ...] = (),
    best: Ceilings | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per backend and peer (or those in `only`); a row whose gate failed has `reason` and no times."""
    op = OPS[op_name]
    cost = roofline.cost_of(op_name, shape)
    about = {"op": op_name, "shape": shape.name, "batch": shape.batch, "context": shape.context, "bytes": cost.bytes,
             "flops": cost.flops}  # fmt: skip
    if known is not None:
        floors = roofline.predict(cost, known, roofline.LAUNCHES.get((op_name, shape.name), 1))
        about |= dict(zip(("memory_us", "compute_us", "predicted_us"), floors, strict=True))
    ready = list(arms(op, shape, dtype, device, only))
    torch.manual_seed(0)
    args, kwargs = shapes.make(op_name, shape, dtype, device)
    rows = []
    for name, reason in ready:
        row = {**about, "backend": name, "kind": "op" if name in BACKENDS else "peer", "reason": reason}
        if reason is None:
            with torch.no_grad(), use_backend(name) if name in BACKENDS else nullcontext():
                try:
                    # References look at values on the host: an attempt to capture one would leave torch's random
                    # numbers bound to a graph that never was.
                    times = clock.measure(call_of(op, name, args, kwargs), rounds, capture=name != "reference")
                except Exception as error:  # out of memory, or a peer at this size
                    row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                else:
                    row |= rates(times, cost, best)
        rows.append(row)
    return rows


def rates(times, cost, best: Ceilings | None) -> dict[str, Any]:
    cold, hot = times.cold, times.hot
    found = {"cold_us": cold.median, "cold_low_us": cold.low, "cold_high_us": cold.high, "hot_us": hot.median,
             "captured": times.captured, "gb_per_s": cost.bytes / cold.median / 1e3,
             "tflop_per_s": cost.flops / cold.median / 1e6}  # fmt: skip
    if best is not None:
        found["bandwidth_share"] = found["gb_per_s"] / best.read_gb_s
        found["rate_share"] = found["tflop_per_s"] / best.matmul_tflops
    return found


def decode_table(
    clock: Clock, known: Device | None, rounds: int = 30, device: str = "cuda", best: Ceilings | None = None
) -> Iterator[dict[str, Any]]:
    """memory_decode over batches and contexts, with the paper's memories and without any: what they cost per layer."""
    for shape in shapes.SHAPES.values():
        for batch, context, refs in itertools.product(BATCHES, CONTEXTS, (0, shape.refs)):
            at = replace(shape, batch=batch, context=context, refs=refs)
            found = measure("memory_decode", at, clock, known, rounds, device=device, only=("cuda",), best=best)
            yield from ({**row, "refs": refs} for row in found)
