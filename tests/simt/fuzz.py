"""Random legal calls of the CUDA kernels, the same ones for a seed: what nobody thought of writing down as a case."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memory3_kernels._registry import Case
from memory3_kernels.ops import _attention_cases as samples
from memory3_kernels.ops import gather_dequantize, gather_memory, merge_attention_states, scatter_memory, vq_dequantize
from memory3_kernels.ops import select_tokens as select

from .cases import COMPILED


def _spec(draw: random.Random, sequences: list[tuple[int, int]], dim: int, chunk: int) -> samples.Spec:
    """Heads, records and layouts around given sequences; every list of records is as long as its chunks ask for."""
    kv_heads, slots, refs, tokens = draw.randint(1, 3), draw.randint(1, 7), draw.randint(0, 5), draw.randint(1, 40)
    mem_heads = draw.randint(1, 3)
    heads = (kv_heads * draw.choice((1, 2, 3, 5, 8, 16)), kv_heads)
    mapped = draw.random() < 0.3
    pieces = sum(-(-rows // chunk) for rows, _ in sequences)
    return samples.Spec(
        heads=heads,
        dim=dim,
        sequences=tuple(sequences),
        chunk=chunk,
        refs=refs,
        tokens=tokens,
        slots=slots,
        slot_rows=tuple(tuple(draw.randint(-1, slots - 1) for _ in range(refs)) for _ in range(pieces)),
        lengths=tuple(draw.choice((0, tokens, draw.randint(0, tokens))) for _ in range(slots)),
        bias=draw.choice(("", "normal", "holes")),
        head_map=tuple(draw.randint(-1, mem_heads - 1) for _ in range(kv_heads)) if mapped else None,
        mem_heads=mem_heads if mapped else None,
        arena=draw.random() < 0.5,
    )


def _decode(draw: random.Random, dim: int) -> samples.Spec:
    longest = draw.choice((30, 300, 900))
    sequences = []
    for _ in range(draw.randint(1, 5)):
        new = draw.choice((0, 1, 1, 1, draw.randint(2, 16)))
        sequences.append((new, draw.choice((0, draw.randint(new, longest)))))
    spec = _spec(draw, sequences, dim, chunk=10**6)
    # Sequences without new tokens have a list of records, too.
    rows = tuple(tuple(draw.randint(-1, spec.slots - 1) for _ in range(spec.refs)) for _ in sequences)
    return samples.replace(spec, slot_rows=rows, page=draw.choice((0, 0, 16, 64)))


def _attention(draw: random.Random, dim: int) -> samples.Spec:
    sequences = []
    for _ in range(draw.randint(1, 3)):
        rows = draw.choice((0, 1, draw.randint(1, 90)))
        sequences.append((rows, rows + draw.choice((0, 0, draw.randint(0, 120)))))
    return _spec(draw, sequences, dim, chunk=draw.choice((1, 7, 16, 64, 65)))


def _code(draw: random.Random, dim: int, width: int = 1) -> tuple[int, int, int]:
    """Bits of the coarse code, pieces and bits of the fine one; a piece is a multiple of `width` values."""
    pieces = [m for m in (1, 2, 4, 5, 8, 16, 20) if dim % (m * width) == 0]
    return draw.randint(4, 9), draw.choice(pieces), draw.randint(4, 10)


def _call(op: str, draw: random.Random) -> Callable:
    dim = draw.choice(COMPILED)
    if op == "memory_decode":
        return samples.decode_sample(_decode(draw, dim))
    if op == "memory_decode_coded":
        return samples.coded_sample(_decode(draw, dim), _code(draw, dim), half_tables=draw.random() < 0.5)
    if op == "memory_attention":
        return samples.attention_sample(_attention(draw, dim))
    if op == "memory_attention_backward":
        return samples.backward_sample(_attention(draw, dim), memory_grad=draw.random() < 0.8)
    if op == "select_tokens":
        rows, kv_heads = draw.randint(1, 150), draw.randint(1, 3)
        start = draw.choice((0, 0, draw.randint(0, 5)))
        lengths = [draw.randint(0, rows) for _ in range(2)]
        group = draw.choice((1, 2, 3, 5))
        return select._sample(2, rows, kv_heads * group, kv_heads, dim, draw.randint(1, 70), draw.choice(select.RULES),
                              start, lengths)  # fmt: skip
    width = draw.choice((dim, draw.randint(1, 40)))
    if op == "gather_memory":
        return gather_memory._sample(draw.randint(1, 4), draw.randint(1, 50), draw.randint(1, 4), width,
                                     draw.randint(1, 20), draw.random() / 2)  # fmt: skip
    if op == "scatter_memory":
        slots = draw.randint(1, 6)
        wanted = [draw.randint(-1, slots - 1) for _ in range(draw.randint(0, 9))]
        return scatter_memory._sample(slots, (draw.randint(1, 3), draw.randint(1, 4), width), wanted)
    tables = {"rotate": draw.random() < 0.7, "half_tables": draw.random() < 0.5}
    if op == "vq_dequantize":
        return vq_dequantize._sample((draw.randint(0, 90),), dim, *_code(draw, dim, width=2), **tables)
    if op == "gather_dequantize":
        slots = draw.randint(1, 5)
        wanted = [draw.randint(-1, slots - 1) for _ in range(draw.randint(0, 6))]
        return gather_dequantize._sample(slots, wanted, draw.randint(1, 3), draw.randint(1, 20), dim,
                                         *_code(draw, dim, width=2), view=draw.random() < 0.5, **tables)  # fmt: skip
    if op == "merge_attention_states":
        return merge_attention_states._sample(draw.randint(4, 50), draw.randint(1, 9), dim, empty=draw.random() < 0.5)
    raise KeyError(f"no random calls are made for {op}")


def cases(op: str, count: int) -> Iterator[Case]:
    """`count` calls of `op`, each from its own number."""
    for number in range(count):
        yield Case(f"fuzz{number}", _call(op, random.Random(f"{op} {number}")))
