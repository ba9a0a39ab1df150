"""Sample calls for the CUDA kernels: those of the contracts, with the head dimensions that are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memory3_kernels._registry import Case
from memory3_kernels.ops import _attention_cases as samples

COMPILED = (64, 80, 128)


def _dim(dim: int, only: int | None) -> int:
    """Every dimension of the contract's samples has a compiled one that stands for it."""
    return only or {16: 64, 8: 80, 24: 80, 32: 128, 256: 128}.get(dim, dim)


def _memory_decode(only: int | None) -> Iterator[Case]:
    for name, spec in samples.decode_specs().items():
        yield Case(name, samples.decode_sample(replace(spec, dim=_dim(spec.dim, only))))
    # One sequence: the cache is cut into several parts, memory is one more, and the parts are merged.
    split = samples.Spec(
        heads=(10, 2), dim=_dim(64, only), sequences=((1, 700),), refs=3, tokens=7, slots=5, lengths=(7, 0, 3, 7, 7)
    )
    yield Case("split", samples.decode_sample(split))
    yield Case("split-rows-paged", samples.decode_sample(
        replace(split, sequences=((3, 1100),), page=16, bias="holes", dim=80)))  # fmt: skip
    yield Case("split-nothing-seen", samples.decode_sample(
        replace(split, sequences=((1, 0), (1, 600)), slot_rows=((-1, -1, -1), (0, -1, 2)))))  # fmt: skip


CASES = {"memory_decode": _memory_decode}


def cases(op: str, dim: int | None = None) -> list[Case]:
    """`dim`: all samples with this head dimension (default: each with its own)."""
    return list(CASES[op](dim))
