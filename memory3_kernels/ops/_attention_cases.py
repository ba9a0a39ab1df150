"""Sample calls of the attention ops. Keys and values that no op may read (behind mem_len, in unlisted slots, behind
kv_len, in unlisted pages) are NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._registry import Case
from ._attention_args import wide_dtype
from ._codec import record_bytes, sample_codes, sample_tables


@dataclass(frozen=True)
class Spec:
    """One sample. Slot rows default to the slots in turn, so that few slots serve many chunks."""

    heads: tuple[int, int] = (4, 2)  # query, KV
    dim: int = 16
    sequences: tuple[tuple[int, int], ...] = ((5, 7), (3, 3))  # (query rows, key rows) each
    chunk: int = 4  # rows per chunk; the last of a sequence may be shorter
    refs: int = 2
    tokens: int = 3
    slots: int = 4
    slot_rows: tuple[tuple[int, ...], ...] | None = None
    lengths: tuple[int, ...] | None = None  # per slot; default: full
    bias: str = ""  # "", "normal", "holes" (some -inf)
    head_map: tuple[int, ...] | None = None
    mem_heads: int | None = None
    arena: bool = False  # mem_k, mem_v as layer views of [S, 2, 2, Hm, K, D]; k, v as views of one buffer
    context: bool = True
    page: int = 0  # 0: dense cache
    spare: int = 5  # cache rows (or pages) nobody may read


def _fill(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=wide_dtype(dtype)).to(dtype)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _pair(shape: Sequence[int], dtype, generator, view: bool) -> tuple[Tensor, Tensor]:
    """Keys and values of `shape`; as a view: both inside one buffer, two layers deep, behind the first axis."""
    if not view:
        return _fill(shape, dtype, generator), _fill(shape, dtype, generator)
    both = _fill((shape[0], 2, 2, *shape[1:]), dtype, generator)
    return both[:, 1, 0], both[:, 1, 1]


def records(spec: Spec, chunks: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)."""
    mem_heads = spec.mem_heads if spec.mem_heads is not None else spec.heads[1]
    shape = (spec.slots, mem_heads, spec.tokens, spec.dim)
    mem_k, mem_v = _pair(shape, dtype, generator, spec.arena)
    if spec.slot_rows is None:
        flat = torch.arange(chunks * spec.refs, dtype=torch.int32) % max(spec.slots, 1)
        mem_slot = flat.reshape(chunks, spec.refs)
    else:
        mem_slot = torch.tensor(spec.slot_rows, dtype=torch.int32).reshape(chunks, spec.refs)
    lengths = spec.lengths if spec.lengths is not None else (spec.tokens,) * spec.slots
    bias = None
    if spec.bias:
        bias = _fill(shape[:3], torch.float64 if dtype is torch.float64 else torch.float32, generator)
        if spec.bias == "holes":
            bias.view(-1)[::3] = -torch.inf
    listed = set(mem_slot.flatten().tolist())
    for slot, length in enumerate(lengths):
        unread = 0 if slot not in listed else length
        for tensor in (mem_k, mem_v) if bias is None else (mem_k, mem_v, bias):
            tensor[slot, :, unread:] = torch.nan
    head_map = None if spec.head_map is None else torch.tensor(spec.head_map, dtype=torch.int32)
    return mem_k, mem_v, mem_slot, torch.tensor(lengths, dtype=torch.int32), bias, head_map


def attention_sample(spec: Spec) -> Callable:
    def make(dtype: torch.dtype, generator: torch.Generator):
        queries, keys = [s[0] for s in spec.sequences], [s[1] for s in spec.sequences]
        pieces = [min(spec.chunk, n - a) for n in queries for a in range(0, n, spec.chunk)]
        q = _fill((sum(queries), spec.heads[0], spec.dim), dtype, generator)
        k = v = None
        if spec.context:
            k, v = _pair((sum(keys), spec.heads[1], spec.dim), dtype, generator, spec.arena)
        mem_k, mem_v, *rest = records(spec, len(pieces), dtype, generator)
        args = (q, k, v, _offsets(queries), _offsets(keys), _offsets(pieces), mem_k, mem_v, *rest)
        sizes = {"max_q": max(queries, default=0), "max_k": max(keys, default=0), "max_chunk": max(pieces, default=0)}
        return args, {"scale": spec.dim**-0.5, **sizes}

    return make


def backward_sample(spec: Spec, memory_grad: bool = True) -> Callable:
    def make(dtype: torch.dtype, generator: torch.Generator):
        from .memory_attention import reference

        args, kwargs = attention_sample(spec)(dtype, generator)
        out, lse, _ = reference(*args, **kwargs)
        grads = _fill(out.shape, dtype, generator), _fill(lse.shape, lse.dtype, generator)
        return (*grads, out, lse, *args), {"memory_grad": memory_grad, **kwargs}

    return make


def cache(spec: Spec, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """(k_cache, v_cache, kv_len, block_table); `sequences` are (new tokens, kv_len)."""
    lengths = [s[1] for s in spec.sequences]
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    tail = (spec.heads[1], spec.dim)
    if spec.page:
        counts = [-(-n // spec.page) for n in lengths]
        shape = (sum(counts) + spec.spare, spec.page, *tail)
        table = torch.full((len(lengths), max(counts, default=0) + 1), -9, dtype=torch.int32)  # -9: never looked up
        order = torch.randperm(shape[0], generator=generator, dtype=torch.int32)[: sum(counts)]
    else:
        counts, table, order = [], None, None
        shape = (len(lengths), max(lengths, default=0) + spec.spare, *tail)
    if spec.arena:  # heads before rows in memory: the HND layout
        k_cache, v_cache = (
            _fill((shape[0], shape[2], shape[1], shape[3]), dtype, generator).transpose(1, 2) for _ in range(2)
        )
    else:
        k_cache, v_cache = _fill(shape, dtype, generator), _fill(shape, dtype, generator)
    unread = torch.ones(shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths):
        if table is None:
            unread[b, :length] = False
            continue
        pages = order[sum(counts[:b]) : sum(counts[: b + 1])]
        table[b, : len(pages)] = pages
        for i, page in enumerate(pages.tolist()):
            unread[page, : length - i * spec.page] = False
    for tensor in (k_cache, v_cache):
        tensor[unread] = torch.nan
    return k_cache, v_cache, kv_len, table


def decode_sample(spec: Spec) -> Callable:
    def make(dtype: torch.dtype, generator: torch.Generator):
        new = [s[0] for s in spec.sequences]
        q = _fill((sum(new), spec.heads[0], spec.dim), dtype, generator)
        args = (q, *cache(spec, dtype, generator), _offsets(new), *records(spec, len(new), dtype, generator))
        longest = max((s[1] for s in spec.sequences), default=0)
        return args, {"scale": spec.dim**-0.5, "max_q": max(new, default=0), "max_kv": longest}

    return make


BASE = Spec()
# What every attention op is tried with; `sequences` and `chunk` are set per op.
MEMORY_SPECS = {
    "R0": replace(BASE, refs=0),
    "all-none": replace(BASE, slot_rows="none"),
    "lengths": replace(BASE, lengths=(0, 1, 3, 2), bias="normal"),
    "twice": replace(BASE, slot_rows="twice", lengths=(3, 2, 3, 3)),
    "group1_D8": replace(BASE, heads=(2, 2), dim=8),
    "group3_D64_arena": replace(
        BASE, heads=(9, 3), dim=64, refs=3, tokens=5, slots=6, arena=True, lengths=(5, 4, 0, 5, 1, 5)
    ),
    "group5_D80": replace(BASE, heads=(5, 1), dim=80, tokens=8),
    "group16_D128": replace(BASE, heads=(16, 1), dim=128, tokens=9, slots=3, bias="holes"),
    "D24": replace(BASE, heads=(2, 1), dim=24, tokens=17, slots=2),
    "D256": replace(BASE, heads=(2, 1), dim=256),
    "head-map": replace(BASE, heads=(6, 3), head_map=(1, -1, 0), mem_heads=2, bias="holes"),
    "empty-sequence": BASE,
    "S0": replace(BASE, slots=0, slot_rows="none"),
    "K0": replace(BASE, tokens=0),
}


def _with_rows(spec: Spec, chunks: int) -> Spec:
    if spec.slot_rows == "none":
        return replace(spec, slot_rows=((-1,) * spec.refs,) * chunks)
    if spec.slot_rows == "twice":  # a slot twice in one chunk, -1 first, and one slot for every chunk
        return replace(spec, slot_rows=tuple(((1, 1) if c % 2 else (-1, 1)) for c in range(chunks)))
    return spec


def _chunks(spec: Spec) -> int:
    return sum(-(-n // spec.chunk) for n, _ in spec.sequences)


GRADIENT = (0, 1, 2, 6, 7)


def attention_specs() -> dict[str, tuple[Spec, tuple[int, ...]]]:
    found = {}
    for name, spec in MEMORY_SPECS.items():
        sequences = ((5, 7), (0, 0), (0, 3), (2, 2)) if name == "empty-sequence" else ((5, 7), (3, 3))
        spec = replace(spec, sequences=sequences)
        small = name in ("lengths", "twice", "group1_D8", "R0")
        grad = (*GRADIENT, *((10,) if spec.bias else ())) if small else ()
        found[name] = _with_rows(spec, _chunks(spec)), grad
    found["chunk1"] = replace(BASE, chunk=1, dim=8), GRADIENT
    found["chunk65"] = replace(BASE, heads=(6, 2), dim=64, sequences=((130, 130), (3, 70)), chunk=65, tokens=32), ()
    found["blocks"] = replace(BASE, heads=(3, 1), dim=32, sequences=((70, 200), (33, 33)), chunk=64, tokens=8), ()
    found["no-context"] = replace(BASE, context=False, bias="holes", lengths=(0, 1, 3, 2)), (0, 6, 7, 10)
    found["Tq0"] = replace(BASE, sequences=((0, 3), (0, 0))), ()
    found["B0"] = replace(BASE, sequences=()), ()
    return found


PREFILL512 = Spec(heads=(9, 3), dim=64, sequences=((512, 512),), chunk=64, refs=5, tokens=32, slots=40, arena=True)


def attention_cases():
    for name, (spec, grad) in attention_specs().items():
        # Rows that see nothing have lse -inf, which finite differences cannot follow.
        yield Case(name, attention_sample(spec), grad=() if name == "no-context" else grad)
    for tokens in (8, 32):
        spec = replace(PREFILL512, tokens=tokens)
        yield Case(f"prefill512_H9x3_D64_5x{tokens}", attention_sample(spec), bench=True, slow=True)


BACKWARD = ("R0", "lengths", "twice", "group3_D64_arena", "group16_D128", "head-map", "empty-sequence", "chunk65",
            "blocks", "no-context", "Tq0", "S0")  # fmt: skip


def backward_cases():
    for name in BACKWARD:
        yield Case(name, backward_sample(attention_specs()[name][0]))
    yield Case("no-memory-grad", backward_sample(attention_specs()["lengths"][0], memory_grad=False))
    yield Case("prefill512_H9x3_D64_5x32", backward_sample(PREFILL512), bench=True, slow=True)


def decode_specs() -> dict[str, Spec]:
    found = {}
    for name, spec in MEMORY_SPECS.items():
        sequences = ((1, 7), (0, 0), (1, 0), (1, 1)) if name == "empty-sequence" else ((1, 7), (1, 40), (1, 1))
        spec = replace(spec, sequences=sequences, chunk=16)
        found[name] = _with_rows(spec, len(sequences))
    found["rows"] = replace(BASE, heads=(6, 2), sequences=((2, 9), (16, 16), (1, 50)), dim=64)
    found["paged"] = replace(
        found["rows"], sequences=((1, 40), (3, 16), (2, 0), (1, 33)), page=16, lengths=(3, 0, 1, 2)
    )
    found["paged-arena"] = replace(BASE, sequences=((1, 70), (1, 5)), dim=32, page=32, arena=True)
    found["long"] = replace(BASE, heads=(3, 1), sequences=((1, 1100), (1, 300)), dim=24, refs=5, tokens=32, slots=12)
    # Rows of many heads come in pieces of few keys.
    found["heads8_D128"] = replace(BASE, heads=(8, 8), dim=128, sequences=((1, 70), (1, 130)))
    found["heads32x8_D128"] = replace(BASE, heads=(32, 8), dim=128, sequences=((1, 128), (1, 61)))
    found["B0"] = replace(BASE, sequences=())
    return found


def decode_cases():
    for name, spec in decode_specs().items():
        yield Case(name, decode_sample(spec))
    for heads, dim, length in (((9, 3), 64, 256), ((9, 3), 64, 1024), ((9, 3), 64, 4096), ((32, 8), 128, 4096)):
        spec = Spec(heads=heads, dim=dim, sequences=((1, length),) * 8, refs=5, tokens=8, slots=40, spare=0)
        yield Case(f"batch8_ctx{length}_H{heads[0]}x{heads[1]}_D{dim}_5x8", decode_sample(spec), bench=True, slow=True)


def coded_sample(spec: Spec, code: tuple[int, int, int] = (4, 4, 5), half_tables: bool = False) -> Callable:
    """memory_decode's sample with codes (b, M, n) for records; codes of unread tokens are arbitrary."""

    def make(dtype: torch.dtype, generator: torch.Generator):
        (*head, mem_k, _, slot, length, bias, head_map), kwargs = decode_sample(spec)(dtype, generator)
        b, pieces, n = code
        books = [
            sample_tables(spec.dim, b, pieces, n, dtype, generator, rotate=not half_tables, half_tables=half_tables)
            for _ in range(2)
        ]
        size = record_bytes(*books[0][:2], spec.tokens)
        slots, mem_heads = mem_k.shape[:2]
        if spec.arena:
            arena = sample_codes((slots, 2, 2, mem_heads, size), generator)
            codes = arena[:, 1, 0], arena[:, 1, 1]
        else:
            codes = sample_codes((slots, mem_heads, size), generator), sample_codes((slots, mem_heads, size), generator)
        return (*head, *codes, slot, length, bias, head_map, *books[0], *books[1]), {"tokens": spec.tokens, **kwargs}

    return make


CODED = ("R0", "all-none", "lengths", "twice", "group1_D8", "group3_D64_arena", "group16_D128", "D256", "head-map",
         "empty-sequence", "S0", "rows", "paged", "long", "B0")  # fmt: skip


def coded_cases():
    specs = decode_specs()
    for name in CODED:
        yield Case(name, coded_sample(specs[name]))
    yield Case("group5_D80_PQ8x10", coded_sample(specs["group5_D80"], (6, 8, 10)))
    yield Case("D24-fp16-tables", coded_sample(specs["D24"], (5, 3, 6), half_tables=True))
    bench = Spec(heads=(40, 8), dim=80, sequences=((1, 1024),), refs=5, tokens=8, slots=40)
    yield Case("paper_ctx1024_H40x8_D80_b14_PQ8x10", coded_sample(bench, (14, 8, 10)), bench=True, slow=True)
