"""Sample calls of the attention ops. Keys and values no op may read (behind mem_len, in unlisted slots, behind kv_len, in
unlisted pages) are NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._registry import BadCase, Case
from ._attention_args import wide_dtype


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
    "group3_D64_arena": replace(BASE, heads=(9, 3), dim=64, refs=3, tokens=5, slots=6, arena=True, lengths=(5, 4, 0, 5, 1, 5)),
    "group5_D80": replace(BASE, heads=(5, 1), dim=80, tokens=8),
    "group16_D128": replace(BASE, heads=(16, 1), dim=128, tokens=9, slots=3, bias="holes"),
    "D24": replace(BASE, heads=(2, 1), dim=24, tokens=17, slots=2),
    "D256": replace(BASE, heads=(2, 1), dim=256),
    "head-map": replace(BASE, heads=(6, 3), head_map=(1, -1, 0), mem_heads=2, bias="holes"),
    "empty-sequence": replace(BASE),
    "S0": replace(BASE, slots=0, slot_rows="none"),
    "K0": replace(BASE, tokens=0),
}  # fmt: skip


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


def attention_cases():
    for name, (spec, grad) in attention_specs().items():
        # Rows that see nothing have lse -inf, which finite differences cannot follow.
        yield Case(name, attention_sample(spec), grad=() if name == "no-context" else grad)
    bench = Spec(heads=(9, 3), dim=64, sequences=((512, 512),), chunk=64, refs=5, tokens=32, slots=40, arena=True)
    yield Case("prefill512_H9x3_D64", attention_sample(bench), bench=True, slow=True)


def backward_cases():
    for name in ("R0", "lengths", "twice", "group3_D64_arena", "group16_D128", "head-map", "empty-sequence", "chunk65", "blocks",
                 "no-context", "Tq0", "S0"):  # fmt: skip
        yield Case(name, backward_sample(attention_specs()[name][0]))
    yield Case("no-memory-grad", backward_sample(attention_specs()["lengths"][0], memory_grad=False))
    bench = Spec(heads=(9, 3), dim=64, sequences=((512, 512),), chunk=64, refs=5, tokens=32, slots=40, arena=True)
    yield Case("prefill512_H9x3_D64", backward_sample(bench), bench=True, slow=True)


def decode_specs() -> dict[str, Spec]:
    found = {}
    for name, spec in MEMORY_SPECS.items():
        sequences = ((1, 7), (0, 0), (1, 0), (1, 1)) if name == "empty-sequence" else ((1, 7), (1, 40), (1, 1))
        spec = replace(spec, sequences=sequences, chunk=16)
        found[name] = _with_rows(spec, len(sequences))
    found["rows"] = replace(BASE, heads=(6, 2), sequences=((2, 9), (16, 16), (1, 50)), dim=64)
    found["paged"] = replace(
        BASE, heads=(6, 2), sequences=((1, 40), (3, 16), (2, 0), (1, 33)), dim=64, page=16, lengths=(3, 0, 1, 2)
    )
    found["paged-arena"] = replace(BASE, sequences=((1, 70), (1, 5)), dim=32, page=32, arena=True)
    found["long"] = replace(BASE, heads=(3, 1), sequences=((1, 1100), (1, 300)), dim=24, refs=5, tokens=32, slots=12)
    found["B0"] = replace(BASE, sequences=())
    return found  # fmt: skip


def decode_cases():
    for name, spec in decode_specs().items():
        yield Case(name, decode_sample(spec))
    bench = Spec(heads=(9, 3), dim=64, sequences=((1, 1024),) * 8, refs=5, tokens=32, slots=40, arena=False)
    yield Case("batch8_ctx1024_H9x3_D64", decode_sample(bench), bench=True, slow=True)


# ---- calls to refuse -------------------------------------------------------------------------------------------------


def _broken(make: Callable, **changes) -> Callable:
    """The sample with arguments replaced: by position (`at3=...`) or by keyword."""

    def call():
        args, kwargs = make(torch.float32, torch.Generator().manual_seed(0))
        args = list(args)
        for name, change in changes.items():
            if name.startswith("at"):
                place = int(name[2:])
                args[place] = change(args[place]) if callable(change) else change
            else:
                kwargs[name] = change
        return tuple(args), kwargs

    return call


def _int(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_bad_cases(make: Callable | None = None, shift: int = 0):
    """`shift`: operands before q."""
    make = make or attention_sample(replace(BASE, bias="normal", head_map=(1, 0)))

    def bad(name: str, place: int, change, match: str, fake: bool = True) -> BadCase:
        return BadCase(name, _broken(make, **{f"at{place + shift}": change}), match, fake)

    def value(name: str, place: int, change, match: str) -> BadCase:
        return bad(name, place, change, match, fake=False)

    def size(name: str, match: str) -> BadCase:
        return BadCase(f"{name}-small", _broken(make, **{name: 1}), match, fake=False)

    zeros = torch.zeros
    yield bad("q-rank", 0, lambda t: t[0], r"q: expected shape \[\*, \*, \*\]|k: expected shape")
    yield bad("q-dim", 0, zeros(8, 4, 12), "expected a head dimension that is a multiple of 8|expected shape")
    yield bad("q-heads", 0, zeros(8, 3, 16), "expected .* multiple of the 2 KV heads, got 3|expected shape")
    yield bad(
        "k-dtype",
        1,
        lambda t: t.to(torch.bfloat16),
        "k: expected .*[fF]loat, got .*BF?l?[oO]?a?t?16|k: expected torch.float32",
    )
    yield bad("v-none", 2, None, "v: expected k and v both given")
    yield bad("v-shape", 2, zeros(10, 2, 8), r"v: expected shape \[10, 2, 16\], got \[10, 2, 8\]")
    yield bad("k-stride", 1, zeros(16, 10, 2).permute(1, 2, 0), "k: expected a last stride of 1")
    yield bad("cu_q-dtype", 3, _int(0, 5, 8).long(), "cu_q: expected .*[iI]nt")
    yield bad("mem_v-shape", 7, zeros(4, 2, 3, 8), r"mem_v: expected shape \[4, 2, 3, 16\]")
    yield bad("mem_slot-shape", 8, zeros(9, 2, dtype=torch.int32), r"mem_slot: expected shape \[3, \*\], got \[9, 2\]")
    yield bad("mem_len-shape", 9, _int(1), r"mem_len: expected shape \[4\], got \[1\]")
    yield bad("mem_bias-dtype", 10, lambda t: t.half(), "mem_bias: expected .*[fF]loat")
    yield bad("head_map-shape", 11, _int(0), r"head_map: expected shape \[2\], got \[1\]")
    yield value("cu_q-start", 3, _int(1, 5, 8), r"cu_q\[0\]: expected 0, got 1")
    yield value("cu_q-falls", 3, _int(0, 9, 8), r"cu_q\[2\]: expected at least cu_q\[1\] = 9, got 8")
    yield value("cu_q-end", 3, _int(0, 5, 7), r"cu_q\[2\]: expected 8, the number of rows, got 7")
    yield value("cu_k-end", 4, _int(0, 7, 11), r"cu_k\[2\]: expected at most 10, the number of rows, got 11")
    yield value("cu_k-short", 4, _int(0, 3, 10), "cu_k: expected at least 5 keys in sequence 0, .* got 3")
    yield value("cu_chunk-boundary", 5, _int(0, 4, 6, 8), r"cu_chunk: expected a boundary at cu_q\[1\] = 5")
    yield value("cu_chunk-end", 5, _int(0, 4, 5, 9), r"cu_chunk\[3\]: expected 8, the number of rows, got 9")
    yield value(
        "mem_slot-high",
        8,
        _int(0, 1, 2, 3, 4, 1).reshape(3, 2),
        r"mem_slot\[2, 0\]: expected -1 or a slot below 4, got 4",
    )
    yield value(
        "mem_slot-low",
        8,
        _int(0, 1, 2, -2, 0, 1).reshape(3, 2),
        r"mem_slot\[1, 1\]: expected -1 or a slot below 4, got -2",
    )
    yield value("mem_len-high", 9, _int(0, 1, 4, 0), r"mem_len\[2\]: expected 0..3, got 4")
    yield value("mem_len-low", 9, _int(0, 1, -1, 0), r"mem_len\[2\]: expected 0..3, got -1")
    yield value("head_map-high", 11, _int(0, 2), r"head_map\[1\]: expected -1 or a record head below 2, got 2")
    yield size("max_q", "max_q: expected at least 5, the longest piece of cu_q, got 1")
    yield size("max_k", "max_k: expected at least 7, the longest piece of cu_k, got 1")
    yield size("max_chunk", "max_chunk: expected at least 4, the longest piece of cu_chunk, got 1")


def backward_bad_cases():
    make = backward_sample(replace(BASE, bias="normal", head_map=(1, 0)))
    yield BadCase("grad_out-shape", _broken(make, at0=torch.zeros(8, 4, 8)), r"grad_out: expected shape \[8, 4, 16\]")
    yield BadCase("grad_lse-dtype", _broken(make, at1=lambda t: t.half()), "grad_lse: expected .*[fF]loat")
    yield BadCase("lse-shape", _broken(make, at3=torch.zeros(8, 3)), r"lse: expected shape \[8, 4\], got \[8, 3\]")
    for bad in attention_bad_cases(make, shift=4):
        if bad.id in (
            "v-none",
            "mem_v-shape",
            "cu_q-falls",
            "cu_k-short",
            "mem_slot-high",
            "mem_len-high",
            "max_q-small",
        ):
            yield bad


def decode_bad_cases(make: Callable | None = None, page_make: Callable | None = None):
    spec = replace(BASE, sequences=((2, 7), (1, 4)), chunk=16, bias="normal", head_map=(1, 0))
    make = make or decode_sample(spec)
    page_make = page_make or decode_sample(replace(spec, page=16))

    def bad(name: str, place: int, change, match: str, fake: bool = True, make=make) -> BadCase:
        return BadCase(name, _broken(make, **{f"at{place}": change}), match, fake)

    zeros = torch.zeros
    yield bad("k_cache-rank", 1, zeros(2, 12, 2), r"k_cache: expected shape \[\*, \*, \*, 16\]")
    yield bad("k_cache-batch", 1, zeros(3, 12, 2, 16), "k_cache: expected 2 sequences|v_cache: expected shape")
    yield bad("v_cache-shape", 2, zeros(2, 12, 2, 8), r"v_cache: expected shape \[2, 12, 2, 16\], got \[2, 12, 2, 8\]")
    yield bad("kv_len-dtype", 3, zeros(2), "kv_len: expected .*[iI]nt")
    yield bad("mem_slot-shape", 8, zeros(3, 2, dtype=torch.int32), r"mem_slot: expected shape \[2, \*\], got \[3, 2\]")
    yield BadCase("max_q-large", _broken(make, max_q=17), "max_q: expected at most 16 new tokens per sequence, got 17")
    yield bad(
        "block_table-shape",
        4,
        zeros(3, 2, dtype=torch.int32),
        r"block_table: expected shape \[2, \*\], got \[3, 2\]",
        make=page_make,
    )
    yield bad(
        "page-size",
        1,
        lambda t: t[:, :12],
        "(v_cache: expected shape|expected pages of a power of two)",
        make=page_make,
    )
    yield bad("cu_q-end", 5, _int(0, 2, 4), r"cu_q\[2\]: expected 3, the number of rows, got 4", fake=False)
    yield bad(
        "kv_len-high",
        3,
        _int(7, 13),
        r"kv_len\[1\]: expected 0, or 1 \(new tokens\) to 12 \(capacity of the cache\), got 13",
        fake=False,
    )
    yield bad("kv_len-low", 3, _int(1, 4), r"kv_len\[0\]: expected 0, or 2 \(new tokens\) to 12", fake=False)
    yield bad(
        "page-high",
        4,
        _int(0, 0, 99, 0).reshape(2, 2),
        r"block_table\[1, 0\]: expected a page below 7, got 99",
        False,
        page_make,
    )
    yield bad(
        "mem_slot-high",
        8,
        _int(0, 1, 2, 4).reshape(2, 2),
        r"mem_slot\[1, 1\]: expected -1 or a slot below 4, got 4",
        fake=False,
    )
    yield bad("mem_len-high", 9, _int(4, 0, 0, 0), r"mem_len\[0\]: expected 0..3, got 4", fake=False)
    yield bad(
        "head_map-low", 11, _int(0, -2), r"head_map\[1\]: expected -1 or a record head below 2, got -2", fake=False
    )
    yield BadCase(
        "max_q-small",
        _broken(make, max_q=1),
        "max_q: expected at least 2, the longest piece of cu_q, got 1",
        fake=False,
    )
    yield BadCase(
        "max_kv-small", _broken(make, max_kv=3), "max_kv: expected at least 7, the largest kv_len, got 3", fake=False
    )
