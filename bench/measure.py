"""One case of an op, timed: every backend and peer on the same values, gated by correctness, hot and cold.

Hot: the same operands at every call. Cold: copies of the operands in turn, together far larger than the last cache, so
that no call finds what it reads there. Rounds are interleaved; a record holds quantiles over the rounds.
"""

from __future__ import annotations

import copy
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from memory3_kernels import _load, use_backend
from memory3_kernels._registry import Case, Op
from memory3_kernels.testing.compare import as_tuple, assert_close, widen

from . import environment
from .ceilings import Ceilings
from .peers import PEERS
from .timing import interleave, quantile, ratios

LONG_ENOUGH_S = 4e-3  # calls are repeated until one measurement takes this long
COLD_BYTES = 1 << 30  # what rotating operands hold together
MOST_COPIES = 1024
PEER_TOLERANCE = 2e-2  # a peer computes the same thing, in its own precision
STATES = ("hot", "cold")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """ "reference", or "native-<level>"."""
    kind, _, level = name.partition("-")
    with use_backend(kind):
        if level:
            with _load.use_simd_level(level):
                yield
        else:
            yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operands(case: Case, dtype: torch.dtype) -> tuple[tuple, dict]:
    return case.make(dtype, torch.Generator().manual_seed(zlib.crc32(case.id.encode())))


def copies(args: tuple, kwargs: dict, bytes_each: int, state: str) -> list[tuple[tuple, dict]]:
    """The operands once (hot), or as often as it takes to hold COLD_BYTES; strides and shared storage are kept."""
    count = 1 if state == "hot" else min(MOST_COPIES, max(2, -(-COLD_BYTES // max(bytes_each, 1))))
    return [(args, kwargs), *(copy.deepcopy((args, kwargs)) for _ in range(count - 1))]


def measure(
    op: Op, case: Case, dtype: torch.dtype, *, levels: Sequence[str], states: Sequence[str], rounds: int,
    ceilings: Ceilings, reference: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of a case: one per backend, peer and state, at the thread count the ceilings were measured with.

    The reference is timed hot only: it is there to be trusted, not to be fast. Raises AssertionError, before any
    timing, where a backend's or a peer's result is wrong.
    """
    args, kwargs = operands(case, dtype)
    cost = op.cost(*args, **kwargs)
    native = [f"native-{level}" for level in levels]
    expected = gate(op, ["reference", *native], args, kwargs, case.slack * op.tolerance[dtype])
    found = []
    for state in states:
        sets = copies(args, kwargs, cost.bytes, state)
        with threads(ceilings.threads):
            arms = {name: timer([caller(op, *one) for one in sets], name) for name in native}
            if reference and state == "hot":
                arms["reference"] = timer([caller(op, args, kwargs)], "reference")
            peers = peers_of(op, sets, expected)
            arms |= {name: timer(calls) for name, calls in peers.items()}
            seen = interleave(arms, rounds)
        about = {"op": op.name, "case": case.id, "dtype": str(dtype).removeprefix("torch."), "state": state}
        found += records(about, seen, list(peers), cost, ceilings, rounds)
        del sets, arms, peers
    return found


def records(about: dict, seen: dict[str, list[float]], peers: list[str], cost, ceilings: Ceilings, rounds: int):
    """Flat rows; `peer_ratio` is the median over the rounds of the first peer's time by this one's."""
    rows = []
    for name, values in seen.items():
        ordered = sorted(values)
        p20, p50, p80 = (quantile(ordered, share) for share in (0.2, 0.5, 0.8))
        beside = {
            peer: quantile(sorted(ratios(seen[peer], values)), 0.5) for peer in peers if name not in ("reference", peer)
        }
        rows.append(
            {
                **about,
                "backend": name,
                "simd": name.partition("-")[2] if name.startswith("native-") else None,
                "kind": "peer" if name in peers else "op",
                "threads": ceilings.threads,
                "rounds": rounds,
                "ms_p20": p20 * 1e3,
                "ms": p50 * 1e3,
                "ms_p80": p80 * 1e3,
                "bytes": cost.bytes,
                "flops": cost.flops,
                "gb_per_s": cost.bytes / p50 / 1e9,
                "gflop_per_s": cost.flops / p50 / 1e9,
                "tflop_per_s": cost.flops / p50 / 1e12,
                "read_share": cost.bytes / p50 / 1e9 / ceilings.read_gb_s,
                "dot_share": cost.flops / p50 / 1e9 / ceilings.dot_gflop_s,
                "peer": peers[0] if peers and name != peers[0] else None,
                "peer_ratio": beside.get(peers[0]) if peers else None,
                "peer_ratios": beside,
                "gate": "passed",
                "source": environment.source_hash(about["op"]),
                "load": environment.load_average(),
            }
        )
    return rows


def gate(op: Op, names: Sequence[str], args: tuple, kwargs: dict, tolerance: float) -> tuple:
    """Compares one call of each backend with the reference in float64, whose outputs it returns (mutated arguments are
    restored).
    """
    before = {i: args[i].clone() for i in op.mutates}
    wide = tuple(widen(a) for a in args)
    expected = as_tuple(op.reference(*wide, **widen(kwargs))) + tuple(wide[i] for i in op.mutates)
    for name in names:
        with backend(name):
            actual = as_tuple(op(*args, **kwargs)) + tuple(args[i].clone() for i in op.mutates)
        for i, value in before.items():
            args[i].copy_(value)
        if op.compare is not None:
            op.compare(actual, expected, args, kwargs, tolerance)
            continue
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, tolerance, f"{op.name} on {name}, output {i}")
    return expected


def peers_of(op: Op, sets: Sequence[tuple[tuple, dict]], expected: tuple) -> dict[str, list[Callable]]:
    """Calls of every peer that serves these arguments, by its name. Raises AssertionError for a wrong result: its first
    output is compared as the op's own would be.
    """
    found = {}
    for make in PEERS.get(op.name, ()):
        try:
            first = make(*sets[0][0], **sets[0][1])
        except (ValueError, RuntimeError):
            continue
        result = first.result(first.call())
        if op.compare is not None:
            op.compare((result,), expected[:1], *sets[0], PEER_TOLERANCE)
        else:
            assert_close(result, expected[0], PEER_TOLERANCE, f"{op.name}'s peer {make.__name__}")
        found[make.__name__] = [first.call, *(make(*args, **kwargs).call for args, kwargs in sets[1:])]
    return found


def caller(op: Op, args: tuple, kwargs: dict) -> Callable[[], object]:
    return lambda: op(*args, **kwargs)


def timer(calls: Sequence[Callable], name: str | None = None) -> Callable[[], float]:
    """Seconds of one call: the mean over enough calls, in turn, to be measurable; on backend `name`, if given."""
    turn = itertools.cycle(calls)

    def seconds(count: int) -> float:
        picked = [next(turn) for _ in range(count)]
        begin = time.perf_counter()
        for call in picked:
            call()
        return (time.perf_counter() - begin) / count

    # A forced backend takes the slow way into the op: the best level goes the way users go.
    forced = name is not None and name != f"native-{_load.simd_level()}"

    def measured(count: int) -> float:
        with torch.no_grad(), backend(name) if forced else nullcontext():
            if len(calls) == 1:  # hot operands: what the other arms pushed out comes back first
                calls[0]()
            return seconds(count)

    count = max(1, int(LONG_ENOUGH_S / max(measured(2), 1e-7)))
    return lambda: measured(count)
