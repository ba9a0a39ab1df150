"""Sample calls for the CUDA kernels: those of the contracts, with the head dimensions that are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memory3_kernels._registry import Case
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import merge_attention_states as merge

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


def _memory_decode_coded(only: int | None) -> Iterator[Case]:
    specs = {name: replace(spec, dim=_dim(spec.dim, only)) for name, spec in samples.decode_specs().items()}
    for name in samples.CODED:
        yield Case(name, samples.coded_sample(specs[name]))
    # Codes as in the paper; the widest fields; pieces of an odd number of elements; tables in float16, no rotation.
    yield Case("PQ8x10", samples.coded_sample(specs["group5_D80"], (14, 8, 10)))
    wide = replace(specs["group5_D80"], dim=80, tokens=33, lengths=(33, 16, 0, 17), arena=True)
    yield Case("PQ16x14", samples.coded_sample(wide, (5, 16, 14)))
    yield Case("fp16-tables", samples.coded_sample(specs["lengths"], (5, 8, 6), half_tables=True))
    yield Case("fp16-tables-odd-pieces", samples.coded_sample(wide, (6, 16, 9), half_tables=True))
    # The cache is cut into several parts.
    split = replace(specs["group5_D80"], heads=(10, 2), sequences=((2, 700),), refs=3, lengths=(8, 0, 3, 8))
    yield Case("split", samples.coded_sample(split, (6, 8, 10)))
    yield Case("split-nothing-seen", samples.coded_sample(
        replace(split, sequences=((1, 0), (1, 600)), slot_rows=((-1, -1, -1), (0, -1, 2)))))  # fmt: skip


def _merge_attention_states(only: int | None) -> Iterator[Case]:
    yield from (case for case in merge.cases() if not case.bench)
    yield Case("more-rows-than-a-block", merge._sample(37, 5, only or 128, empty=True))


CASES = {
    "memory_decode": _memory_decode,
    "memory_decode_coded": _memory_decode_coded,
    "merge_attention_states": _merge_attention_states,
}


def cases(op: str, dim: int | None = None) -> list[Case]:
    """`dim`: all samples with this head dimension (default: each with its own)."""
    return list(CASES[op](dim))
