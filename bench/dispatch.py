"""What a call costs before any work: each op on its emptiest case, from Python."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from memory3_kernels._registry import Case, Op

from .measure import operands
from .timing import Summary

CALLS = 2000


def emptiest(op: Op, dtype: torch.dtype) -> Case:
    """The case with the least work by the op's own count."""

    def work(case: Case) -> tuple[int, int]:
        args, kwargs = operands(case, dtype)
        cost = op.cost(*args, **kwargs)
        return cost.flops, cost.bytes

    return min((case for case in op.cases() if not case.slow), key=work)


def measure(ops: Sequence[Op], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Microseconds per call, median over rounds in which the ops take turns."""
    calls = {}
    for op in ops:
        of = dtype if dtype in op.dtypes else op.dtypes[0]
        case = emptiest(op, of)
        calls[op.name] = (op, case.id, *operands(case, of))
    seen: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, (op, _, args, kwargs) in calls.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    op(*args, **kwargs)
                seen[name].append((time.perf_counter() - begin) / CALLS)
    return [
        {"op": name, "case": calls[name][1], "us": Summary.of(values[1:]).median * 1e6, "us_low": min(values[1:]) * 1e6}
        for name, values in seen.items()
    ]
