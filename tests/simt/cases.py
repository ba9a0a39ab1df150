"""Sample calls for the CUDA kernels: those of the contracts, with the head dimensions that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from memory3_kernels._registry import Case
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import merge_attention_states as merge

from . import record_cases

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
    yield Case("values-apart", record_cases.apart(samples.decode_sample(replace(split, bias="normal")), 2, 7, gap=8))


def _memory_attention(only: int | None) -> Iterator[Case]:
    for name, (spec, _) in samples.attention_specs().items():
        yield Case(name, samples.attention_sample(replace(spec, dim=_dim(spec.dim, only))))
    for name, spec in _attention_extra(only):
        yield Case(name, samples.attention_sample(spec))
    yield Case("empty-chunk", _empty_chunk(samples.attention_sample(_shared(only)), 5))
    yield Case("values-apart", record_cases.apart(samples.attention_sample(_shared(only)), 2, 7, gap=8))


def _memory_attention_backward(only: int | None) -> Iterator[Case]:
    specs = samples.attention_specs()
    for name in samples.BACKWARD:
        spec = specs[name][0]
        yield Case(name, samples.backward_sample(replace(spec, dim=_dim(spec.dim, only))))
    lengths = specs["lengths"][0]
    yield Case("no-memory-grad", samples.backward_sample(replace(lengths, dim=_dim(16, only)), memory_grad=False))
    for name, spec in _attention_extra(only):
        yield Case(name, samples.backward_sample(spec))
    yield Case("shared", samples.backward_sample(_shared(only)))
    yield Case("empty-chunk", _empty_chunk(samples.backward_sample(_shared(only)), 9))
    yield Case("values-apart", record_cases.apart(samples.backward_sample(_shared(only)), 6, 11, gap=8))


def _shared(only: int | None) -> samples.Spec:
    """Two KV heads read one record head; a slot is listed by many chunks."""
    head_map = samples.attention_specs()["head-map"][0]
    return replace(head_map, dim=_dim(64, only), head_map=(1, 1, 0), slots=2, chunk=2)


def _empty_chunk(make: Callable, at: int) -> Callable:
    """The same call with a chunk of no rows behind the first, which lists the slots of the last; `at`: of cu_chunk
    among the arguments."""

    def made(dtype: torch.dtype, generator: torch.Generator):
        args, kwargs = make(dtype, generator)
        args = list(args)
        offsets, slots = args[at], args[at + 3]
        args[at] = torch.cat([offsets[:2], offsets[1:]])
        args[at + 3] = torch.cat([slots[:1], slots[-1:], slots[1:]])
        return tuple(args), kwargs

    return made


def _attention_extra(only: int | None) -> Iterator[tuple[str, samples.Spec]]:
    # Several tiles of query vectors and of keys; records of 7 tokens, which tiles of 32 cut anywhere.
    yield "tiles", samples.Spec(
        heads=(10, 2), dim=_dim(80, only), sequences=((70, 150),), chunk=64, refs=6, tokens=7, slots=9, bias="holes",
        lengths=(7, 0, 3, 7, 7, 1, 7, 7, 2),
    )  # fmt: skip
    # More records than wait in shared memory for the log-sum-exp (memory_attention/record_mass.cuh), twice over.
    yield "records", samples.Spec(heads=(2, 1), dim=_dim(64, only), refs=19, tokens=3, slots=7)
    # More sequences than a warp looks at together, some empty; a slot's readers lie further apart than that, too.
    sequences = tuple((n % 3, n % 3 + n % 2) for n in range(70))
    yield "sequences", samples.Spec(heads=(2, 1), dim=_dim(64, only), sequences=sequences, chunk=64, tokens=2, slots=41)


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
    "memory_attention": _memory_attention,
    "memory_attention_backward": _memory_attention_backward,
    "memory_decode_coded": _memory_decode_coded,
    "merge_attention_states": _merge_attention_states,
    "select_tokens": record_cases.select_tokens,
    "gather_memory": record_cases.gather_memory,
    "scatter_memory": record_cases.scatter_memory,
    "vq_dequantize": record_cases.vq_dequantize,
    "gather_dequantize": record_cases.gather_dequantize,
}


def cases(op: str, dim: int | None = None) -> list[Case]:
    """`dim`: all samples with this head dimension (default: each with its own)."""
    return list(CASES[op](dim))
