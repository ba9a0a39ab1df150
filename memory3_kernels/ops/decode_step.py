"""decode_step: new tokens, one per sequence or many, through a whole Llama decoder in one call
(docs/ops/decode_step.md).

Attention over cache and records as memory_attention (Memory3, arXiv 2407.01178, section 3.2), linear maps as
packed_linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ..packed import (
    BLOCK,
    FORMATS,
    LETTERS,
    TILE,
    PackedWeights,
    check_activations,
    join_weights,
    pack_weight,
    round_activations,
    tile_bytes,
    unpack_weight,
)
from . import memory_attention as attention
from ._attention_args import check_boundaries, check_head_map, check_offsets, check_slot_values, expect_index
from ._checks import check_range, expect_dtype, expect_shape, expect_unit_stride

SCHEMA = (
    "(Tensor tokens, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor embed, Tensor norms, Tensor rope, "
    "Tensor weights, Tensor? mem_kv=None, Tensor? mem_slot=None, Tensor? mem_len=None, Tensor? mem_bias=None, "
    "Tensor? head_map=None, Tensor? cu_q=None, Tensor? cu_chunk=None, Tensor? rows=None, *, str formats, "
    "str activations, int ffn, int[] memory_layers, int heads, int span, float eps, float scale, int threads, "
    "Tensor(c!)? profile=None) -> (Tensor, Tensor)"
)
STAGES = ("embed", "norm", "linear", "attention", "ffn", "head", "wait")
PER_LAYER = 4  # packed weights: queries, keys and values; output; gate and up; down


def _weight_shapes(layers: int, heads: int, kv_heads: int, head_dim: int, width: int, ffn: int, vocab: int):
    """(rows, cols) of every packed weight."""
    wide = heads * head_dim
    layer = [(wide + 2 * kv_heads * head_dim, width), (width, wide), (2 * ffn, width), (width, ffn)]
    return [*layer * layers, (vocab, width)]


def _check_weights(weights: Tensor, formats: str, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, str]]:
    """Rows, columns and format of every packed weight."""
    torch._check(
        len(formats) == len(shapes),
        lambda: f"formats: expected {len(shapes)} letters, four per layer and the head, got {len(formats)}",
    )
    names = {letter: name for name, letter in LETTERS.items()}
    strange = [i for i, letter in enumerate(formats) if letter not in names]
    torch._check(
        not strange,
        lambda: f"formats[{strange[0]}]: expected one of {', '.join(names)}, got {formats[strange[0]]}",
    )
    found = [(rows, cols, names[letter]) for (rows, cols), letter in zip(shapes, formats, strict=True)]
    size = sum(_weight_bytes(*one) for one in found)
    torch._check(
        weights.dtype is torch.uint8 and weights.dim() == 1 and weights.shape[0] == size and weights.is_contiguous(),
        lambda: f"weights: expected {size} bytes (uint8, contiguous), got {weights.dtype} {list(weights.shape)}",
    )
    return found


def _weight_bytes(rows: int, cols: int, format: str) -> int:
    return -(-rows // TILE) * tile_bytes(cols, format)


def _check(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv, mem_slot, mem_len, mem_bias, head_map,
    cu_q, cu_chunk, rows, formats, activations, ffn, memory_layers, heads, threads, profile,
) -> list[tuple[int, int, str]]:  # fmt: skip
    """Shapes and dtypes; rows, columns and format of every weight."""
    expect_shape("k_cache", k_cache, -1, -1, -1, -1, -1)
    layers, batch, _, kv_heads, dim = k_cache.shape
    wide = k_cache.dtype is torch.float64
    element, exact = (torch.float64, torch.float64) if wide else (torch.bfloat16, torch.float32)
    expect_shape("v_cache", v_cache, *k_cache.shape)
    chunks = _check_cuts(tokens, cu_q, cu_chunk, rows, batch)
    expect_dtype("tokens", tokens, torch.int64)
    expect_shape("lengths", lengths, batch)
    expect_dtype("lengths", lengths, torch.int32)
    expect_shape("embed", embed, -1, -1)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("embed", embed)):
        expect_dtype(name, tensor, element)
        expect_unit_stride(name, tensor)
    vocab, width = embed.shape
    torch._check(
        heads > 0 and kv_heads > 0 and width > 0 and width % BLOCK == 0,
        lambda: f"embed: expected a multiple of {BLOCK} columns, got {width} ({heads} heads of {kv_heads})",
    )
    expect_shape("norms", norms, 2 * layers + 1, width)
    expect_shape("rope", rope, 2, -1, dim)
    for name, tensor in (("norms", norms), ("rope", rope)):
        expect_dtype(name, tensor, exact)
    torch._check(1 <= threads <= 256, lambda: f"threads: expected 1 to 256, got {threads}")
    torch._check(ffn > 0 and ffn % BLOCK == 0, lambda: f"ffn: expected a multiple of {BLOCK}, got {ffn}")
    check_activations(activations)
    found = _check_weights(weights, formats, _weight_shapes(layers, heads, kv_heads, dim, width, ffn, vocab))
    if mem_kv is not None:
        torch._check(
            mem_slot is not None and mem_len is not None,
            lambda: "mem_kv: expected mem_slot and mem_len with it, got None",
        )
        count = len(memory_layers)
        expect_shape("mem_kv", mem_kv, -1, count, 2, -1, -1, dim)
        expect_dtype("mem_kv", mem_kv, element)
        expect_unit_stride("mem_kv", mem_kv)
        slots, _, _, mem_heads, tokens_each, _ = mem_kv.shape
        if head_map is not None:
            expect_shape("head_map", head_map, count, kv_heads)
            expect_dtype("head_map", head_map, torch.int32)
        else:
            torch._check(
                mem_heads == kv_heads,
                lambda: (
                    f"head_map: expected one where records have {mem_heads} heads and the model {kv_heads} KV heads, "
                    "got None"
                ),
            )
        expect_shape("mem_slot", mem_slot, chunks, -1)
        expect_dtype("mem_slot", mem_slot, torch.int32)
        expect_shape("mem_len", mem_len, slots)
        expect_dtype("mem_len", mem_len, torch.int32)
        if mem_bias is not None:
            expect_shape("mem_bias", mem_bias, slots, count, mem_heads, tokens_each)
            expect_dtype("mem_bias", mem_bias, exact)
            expect_unit_stride("mem_bias", mem_bias)
    if profile is not None:
        expect_shape("profile", profile, len(STAGES))
        expect_dtype("profile", profile, torch.int64)
    return found


def _check_cuts(tokens: Tensor, cu_q: Tensor | None, cu_chunk: Tensor | None, rows: Tensor | None, batch: int) -> int:
    """How tokens are cut into sequences and chunks; returns the number of chunks."""
    expect_shape("tokens", tokens, -1 if cu_q is not None else batch)
    if cu_q is None:
        torch._check(
            cu_chunk is None and rows is None, lambda: "cu_q: expected it with cu_chunk or rows, which cut it, got None"
        )
        return batch
    expect_index("cu_q", cu_q, batch + 1)
    if rows is not None:
        expect_shape("rows", rows, -1)
        expect_dtype("rows", rows, torch.int64)
    if cu_chunk is None:
        return batch
    expect_index("cu_chunk", cu_chunk, -1)
    torch._check(cu_chunk.shape[0] > 0, lambda: "cu_chunk: expected at least one offset, got none")
    return cu_chunk.shape[0] - 1


def _results(tokens, k_cache, embed, mem_kv, mem_slot, rows) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if embed.dtype is torch.float64 else torch.float32
    refs = 0 if mem_kv is None else mem_slot.shape[1]
    wanted = k_cache.shape[1] if rows is None else rows.shape[0]
    return (
        tokens.new_empty((wanted, embed.shape[0]), dtype=exact),
        tokens.new_empty((tokens.shape[0], refs), dtype=exact),
    )


def fake(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, cu_q=None, cu_chunk=None, rows=None, *, formats, activations, ffn,
    memory_layers, heads, span, eps, scale, threads, profile=None,
):  # fmt: skip
    _check(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv, mem_slot, mem_len, mem_bias,
           head_map, cu_q, cu_chunk, rows, formats, activations, ffn, memory_layers, heads, threads,
           profile)  # fmt: skip
    return _results(tokens, k_cache, embed, mem_kv, mem_slot, rows)


def _check_values(
    tokens, lengths, k_cache, embed, rope, mem_kv, mem_slot, mem_len, head_map, cu_q, cu_chunk, rows, memory_layers,
    span,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Where sequences and chunks begin and end."""
    cuts = list(range(k_cache.shape[1] + 1)) if cu_q is None else cu_q.tolist()
    check_offsets("cu_q", cuts, tokens.shape[0], True)
    chunks = cuts if cu_chunk is None else cu_chunk.tolist()
    check_offsets("cu_chunk", chunks, tokens.shape[0], True)
    check_boundaries(cuts, chunks)
    check_range("tokens", tokens, 0, embed.shape[0] - 1)
    for b, length in enumerate(lengths.tolist()):
        new = cuts[b + 1] - cuts[b]
        if not 0 <= length <= k_cache.shape[2] - new:
            raise RuntimeError(
                f"lengths[{b}]: expected 0..{k_cache.shape[2] - new}, since {new} more must fit the cache, got {length}"
            )
        if not 0 <= length + span <= rope.shape[1] - new:
            raise RuntimeError(
                f"lengths[{b}]: expected positions below {rope.shape[1]}, the rows of rope, "
                f"got {length} + span {span} and {new} more"
            )
    if rows is not None:
        check_range("rows", rows, 0, tokens.shape[0] - 1)
    if mem_kv is None:
        return cuts, chunks
    for i, layer in enumerate(memory_layers):
        if not 0 <= layer < k_cache.shape[0] or (i and layer <= memory_layers[i - 1]):
            raise RuntimeError(f"memory_layers[{i}]: expected ascending layers below {k_cache.shape[0]}, got {layer}")
    check_slot_values(mem_slot, mem_len, mem_kv.shape[4])
    for row in head_map if head_map is not None else ():
        check_head_map(row, mem_kv.shape[3])
    return cuts, chunks


def reference(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, cu_q=None, cu_chunk=None, rows=None, *, formats, activations, ffn,
    memory_layers, heads, span, eps, scale, threads, profile=None,
):  # fmt: skip
    shapes = _check(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv, mem_slot, mem_len, mem_bias,
                    head_map, cu_q, cu_chunk, rows, formats, activations, ffn, memory_layers, heads, threads,
                    profile)  # fmt: skip
    cuts, chunks = _check_values(tokens, lengths, k_cache, embed, rope, mem_kv, mem_slot, mem_len, head_map, cu_q,
                                 cu_chunk, rows, memory_layers, span)  # fmt: skip
    layers, batch, _, kv_heads, dim = k_cache.shape
    exact, element = norms.dtype, k_cache.dtype
    logits, mass = _results(tokens, k_cache, embed, mem_kv, mem_slot, rows)
    mass.zero_()
    begins = [0, *accumulate(_weight_bytes(*shape) for shape in shapes)]

    def linear(x: Tensor, index: int) -> Tensor:
        out, cols, format = shapes[index]
        packed = weights[begins[index] : begins[index + 1]].view(-1, tile_bytes(cols, format))
        if element is not exact:  # float64 stands for exact arithmetic
            x = round_activations(x.to(exact), "bf16" if format == "bf16" else activations)
        return x @ unpack_weight(packed, out, cols, format, exact).T

    def norm(x: Tensor, index: int) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norms[index]

    def rotate(x: Tensor) -> Tensor:
        return x * turn[0] + x.roll(dim // 2, -1) * turn[1]

    def cached(cache: Tensor) -> Tensor:
        return torch.cat([cache.new_empty((0, kv_heads, dim)), *(cache[b, :n] for b, n in enumerate(held))])

    new = [end - begin for begin, end in pairwise(cuts)]
    held = [have + n for have, n in zip(lengths.tolist(), new, strict=True)]
    sequence = torch.repeat_interleave(torch.tensor(new, dtype=torch.int64))
    at = torch.tensor([row for n, end in zip(new, held, strict=True) for row in range(end - n, end)], dtype=torch.int64)
    turn = rope[:, at + span].unsqueeze(2)
    offsets = [torch.tensor(o, dtype=torch.int32) for o in (cuts, [0, *accumulate(held)], chunks)]
    sizes = {"max_q": max(new, default=0), "max_k": max(held, default=0), "max_chunk": max(new, default=0)}
    x = embed[tokens].to(exact)
    for layer in range(layers):
        first = PER_LAYER * layer
        qkv = linear(norm(x, 2 * layer), first).view(-1, heads + 2 * kv_heads, dim)
        k_cache[layer, sequence, at] = rotate(qkv[:, heads : heads + kv_heads]).to(element)
        v_cache[layer, sequence, at] = qkv[:, heads + kv_heads :].to(element)
        if mem_kv is not None and layer in memory_layers:
            i = memory_layers.index(layer)
            bias, map_ = (None if t is None else t for t in (mem_bias, head_map))
            records = (mem_kv[:, i, 0], mem_kv[:, i, 1], mem_slot, mem_len,
                       None if bias is None else bias[:, i], None if map_ is None else map_[i])  # fmt: skip
        else:
            none = k_cache.new_empty((0, kv_heads, 1, dim))
            records = (none, none, lengths.new_empty((len(chunks) - 1, 0)), lengths.new_empty(0), None, None)
        attended, _, seen = attention.reference(
            rotate(qkv[:, :heads]).to(element), cached(k_cache[layer]), cached(v_cache[layer]), *offsets, *records,
            scale=scale, **sizes,
        )  # fmt: skip
        if seen.shape[-1]:
            mass += seen.mean(1) / len(memory_layers)
        x = x + linear(attended.flatten(1), first + 1)
        gate, up = linear(norm(x, 2 * layer + 1), first + 2).chunk(2, -1)
        x = x + linear(gate * gate.sigmoid() * up, first + 3)
    if rows is None:  # the last token of each sequence, zeros for one without
        last = torch.cat((x, x.new_zeros((1, x.shape[1]))))
        x = last[[end - 1 if n else -1 for end, n in zip(cuts[1:], new, strict=True)]] if batch else x[:0]
    else:
        x = x[rows]
    logits.copy_(linear(norm(x, 2 * layers), PER_LAYER * layers))
    return logits, mass


def _sample(batch, layers=2, heads=4, kv_heads=2, dim=16, width=64, ffn=96, vocab=50, format="bf16",
            activations="bf16", memory=(),
            refs=2, bias=False, mapped=False, lengths=None, capacity=24, threads=1, span=0, full=0, new=None,
            chunk=None, rows=None):  # fmt: skip
    """`full`: every sequence has its own `refs` records of so many tokens; else some of four of up to three tokens.

    `new`: tokens of each sequence, of which `chunk` read the same records; None: one each.
    """

    def make(dtype: torch.dtype, generator: torch.Generator):
        element, exact = (torch.float64, torch.float64) if dtype is torch.float64 else (torch.bfloat16, torch.float32)

        def draw(*size, factor=1.0, to=element):
            return (torch.randn(*size, generator=generator, dtype=torch.float32) * factor).to(torch.bfloat16).to(to)

        wide = heads * dim
        shapes = [(wide + 2 * kv_heads * dim, width), (width, wide), (2 * ffn, width), (width, ffn)] * layers
        formats = [format] * len(shapes) + ["q8_0" if format == "q4_1" else format]
        weights, _ = join_weights([
            pack_weight(draw(rows, cols, factor=cols**-0.5, to=torch.float32), name, activations)
            for name, (rows, cols) in zip(formats, [*shapes, (vocab, width)], strict=True)
        ])  # fmt: skip
        have = [(7 * b + 5) % capacity for b in range(batch)] if lengths is None else lengths
        cu_q = None if new is None else [0, *accumulate(new)]
        cu_chunk = None if chunk is None else sorted({*cu_q, *range(0, cu_q[-1], chunk)})
        count = batch if new is None else cu_q[-1]
        chunks = batch if cu_chunk is None else len(cu_chunk) - 1
        angle = torch.outer(torch.arange(capacity + span), 50.0 ** -(torch.arange(dim // 2) * 2 / dim)).to(exact)
        args = [
            torch.randint(0, vocab, (count,), generator=generator), torch.tensor(have, dtype=torch.int32),
            draw(layers, batch, capacity, kv_heads, dim), draw(layers, batch, capacity, kv_heads, dim),
            draw(vocab, width), 1 + draw(2 * layers + 1, width, factor=0.1, to=exact),
            torch.stack((torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1))),
            weights.data,
        ]  # fmt: skip
        if memory:
            held = 1 if mapped else kv_heads
            if full:
                slots, tokens, length = batch * refs, full, [full] * (batch * refs)
                slot = torch.randperm(slots, generator=generator, dtype=torch.int32).view(batch, refs)
            else:
                slots, tokens, length = 4, 3, [3, 1, 0, 2]
                slot = torch.randint(-1, 4, (chunks, refs), generator=generator, dtype=torch.int32)
            args += [draw(slots, len(memory), 2, held, tokens, dim), slot, torch.tensor(length, dtype=torch.int32)]
            args += [draw(slots, len(memory), held, tokens, to=exact) if bias else None]
            args += [torch.randint(-1, 1, (len(memory), kv_heads), generator=generator, dtype=torch.int32)
                     if mapped else None]  # fmt: skip
        if new is not None:
            args += [None] * (13 - len(args))
            args += [None if o is None else torch.tensor(o, dtype=torch.int32) for o in (cu_q, cu_chunk)]
            args += [None if rows is None else torch.tensor(rows)]
        kwargs = {"memory_layers": list(memory), "heads": heads, "span": span, "eps": 1e-5, "scale": dim**-0.5}
        kwargs |= {"formats": weights.formats, "activations": activations, "ffn": ffn, "threads": threads}
        return tuple(args), kwargs

    return make


def cases():
    for format in FORMATS:
        yield Case(f"B1-{format}", _sample(1, format=format))
        yield Case(f"B3-memory-{format}", _sample(3, format=format, memory=(1,), span=5, threads=2))
    # Eight bits of activations, where the truth is exact ones.
    bytes_, coarse = {"activations": "mxint8"}, {"slack": 3.0}
    for format in ("q8_0", "q4_1"):
        yield Case(f"B3-memory-{format}-mxint8", _sample(3, format=format, memory=(1,), span=5, threads=2, **bytes_),
                   **coarse)  # fmt: skip
        yield Case(f"B3-prompt-{format}-mxint8", _sample(3, format=format, lengths=[0, 4, 1], new=[7, 19, 2], threads=2,
                                                         memory=(1,), **bytes_), **coarse)  # fmt: skip
    yield Case("B20-many-rows-mxint8", _sample(20, format="q4_1", memory=(0,), threads=2, **bytes_), **coarse)
    yield Case("B2-memory-bias", _sample(2, memory=(0, 1), bias=True, threads=2))
    yield Case("B2-memory-heads", _sample(2, layers=3, memory=(0, 2), bias=True, mapped=True))
    yield Case("B2-no-refs", _sample(2, memory=(0,), refs=0))
    yield Case("B5-first-token-D8", _sample(5, dim=8, heads=12, kv_heads=4, lengths=[0, 0, 3, 23, 1], threads=3))
    yield Case("B2-D64-one-kv-head", _sample(2, layers=1, dim=64, heads=3, kv_heads=1, vocab=33))
    yield Case("B20-many-rows", _sample(20, format="q4_1", memory=(0,), threads=2))
    yield Case("L0", _sample(2, layers=0))
    yield Case("B0", _sample(0))
    for format in FORMATS:
        yield Case(f"B3-prompt-{format}", _sample(3, format=format, lengths=[0, 4, 1], new=[7, 19, 2], threads=2))
    long = {"lengths": [3, 0, 8], "capacity": 200, "span": 5}
    yield Case("B3-prompt-memory", _sample(3, memory=(1,), new=[70, 0, 130], chunk=16, threads=2, **long))
    yield Case("B3-prompt-bias-rows", _sample(3, memory=(0, 1), bias=True, new=[9, 40, 1], rows=[0, 49, 9, 9], **long))
    yield Case("B2-prompt-heads-q4_1", _sample(2, layers=3, format="q4_1", memory=(0, 2), mapped=True, lengths=[0, 2],
                                               new=[20, 21], threads=3))  # fmt: skip
    yield Case("B2-prompt-D24", _sample(2, dim=24, heads=4, kv_heads=1, lengths=[1, 0], new=[3, 23]))
    yield Case("B1-prompt-D72", _sample(1, layers=1, dim=72, heads=4, kv_heads=2, lengths=[2], new=[21], memory=(0,)))
    yield Case("B2-prompt-two-blocks", _sample(2, layers=1, memory=(0,), lengths=[0, 1], new=[300, 299], capacity=301,
                                               chunk=64, threads=2))  # fmt: skip
    yield Case("B2-prompt-of-nothing", _sample(2, new=[0, 0]))
    yield Case("B2-prompt-L0", _sample(2, layers=0, new=[3, 2]))
    for format in FORMATS:
        yield Case(
            f"smollm2_prompt128-{format}",
            _sample(1, 30, 9, 3, 64, 576, 1536, 49152, format, lengths=[0], capacity=128, new=[128]),
            slow=True, bench=True,
        )  # fmt: skip
    yield Case(
        "smollm2_prompt128-q4_1-mxint8",
        _sample(1, 30, 9, 3, 64, 576, 1536, 49152, "q4_1", lengths=[0], capacity=128, new=[128], **bytes_),
        slow=True, bench=True, **coarse,
    )  # fmt: skip
    for batch in (1, 8):
        for format in FORMATS:
            model = (batch, 30, 9, 3, 64, 576, 1536, 49152, format)
            sizes = {"lengths": [250] * batch, "capacity": 256}
            yield Case(f"smollm2_B{batch}_N256-{format}", _sample(*model, **sizes), slow=True, bench=True)
            if format == "q4_1":
                rounded = _sample(*model, **sizes, **bytes_)
                yield Case(f"smollm2_B{batch}_N256-q4_1-mxint8", rounded, slow=True, bench=True, **coarse)
                read = {"memory": tuple(range(30)), "refs": 5, "full": 32}
                records = _sample(*model, **sizes, **read)
                yield Case(f"smollm2_B{batch}_N256-{format}-5x32", records, slow=True, bench=True)


def bad_cases():
    def broken(change=None, new=None, **changes):
        def make():
            sample = _sample(2, memory=(1,), lengths=[3, 4], new=new, rows=None if new is None else [1])
            args, kwargs = sample(torch.bfloat16, torch.Generator().manual_seed(0))
            args = list(args)
            for position, value in (change or {}).items():
                args[position] = value(args[position])
            return tuple(args), {**kwargs, **changes}

        return make

    def is_(value):
        return lambda _: value

    def int32(*values):
        return is_(torch.tensor(values, dtype=torch.int32))

    yield BadCase("tokens", broken({0: lambda t: t.int()}), "tokens: expected .*([iI]nt64|Long)")
    yield BadCase("cache-dtype", broken({2: lambda t: t.float()}), "k_cache: expected .*BFloat16|bfloat16")
    yield BadCase("v-cache", broken({3: lambda t: t[:, :, 1:]}), r"v_cache: expected shape \[2, 2, 24, 2, 16\]")
    yield BadCase("width", broken({4: lambda t: t[:, :40]}), "embed: expected a multiple of 32 columns, got 40")
    yield BadCase("norms", broken({5: lambda t: t[1:]}), r"norms: expected shape \[5, 64\], got \[4, 64\]")
    yield BadCase("rope", broken({6: lambda t: t[:1]}), r"rope: expected shape \[2, \*, 16\], got \[1, 24, 16\]")
    yield BadCase("weights", broken({7: lambda w: w[64:]}), r"weights: expected 131072 bytes .*\[131008\]")
    yield BadCase("weights-dtype", broken({7: lambda w: w.char()}), "weights: expected 131072 bytes .uint8")
    yield BadCase(
        "formats", broken(formats="bbbbbbbb"), "formats: expected 9 letters, four per layer and the head, got 8"
    )
    yield BadCase("format", broken(formats="bbb?bbbbb"), r"formats\[3\]: expected one of b, 8, 4, got \?")
    yield BadCase("activations", broken(activations="fp8"), "activations: expected .*bf16.* got fp8")
    yield BadCase("ffn", broken(ffn=90), "ffn: expected a multiple of 32, got 90")
    yield BadCase("heads", broken(heads=6), "weights: expected .* bytes")
    yield BadCase("threads", broken(threads=0), "threads: expected 1 to 256, got 0")
    yield BadCase("slot-missing", broken({9: is_(None)}), "mem_kv: expected mem_slot and mem_len with it, got None")
    yield BadCase("layers", broken(memory_layers=[0, 1]), r"mem_kv: expected shape \[\*, 2, 2, \*, \*, 16\]")
    yield BadCase("profile", broken(profile=torch.zeros(3, dtype=torch.int64)), r"profile: expected shape \[7\]")
    high = torch.tensor([1, 50])
    yield BadCase("token", broken({0: is_(high)}), r"tokens\[1\]: expected 0..49, got 50", fake=False)
    yield BadCase(
        "length", broken({1: int32(3, 24)}), r"lengths\[1\]: expected 0..23, since 1 more must fit", fake=False
    )
    yield BadCase("position", broken(span=20), r"lengths\[1\]: expected positions below 24, .* got 4 \+ span 20",
                  fake=False)  # fmt: skip
    yield BadCase("memory-layer", broken(memory_layers=[2]), r"memory_layers\[0\]: .* below 2, got 2", fake=False)
    prompt = [2, 3]
    yield BadCase("cu_q-short", broken({13: lambda t: t[1:]}, prompt), r"cu_q: expected shape \[3\], got \[2\]")
    yield BadCase("cu_q-none", broken({13: is_(None)}, [1, 1]), "cu_q: expected it with cu_chunk or rows")
    yield BadCase("rows-dtype", broken({15: lambda t: t.int()}, prompt), "rows: expected .*([iI]nt64|Long)")
    yield BadCase("cu_q", broken({13: int32(0, 2, 4)}, prompt), r"cu_q\[2\]: expected 5, the number", fake=False)
    yield BadCase("cu_chunk", broken({14: int32(0, 1, 5)}, prompt), r"cu_chunk: expected a boundary at cu_q\[1\] = 2",
                  fake=False)  # fmt: skip
    yield BadCase("fits", broken({1: int32(0, 22)}, prompt), r"lengths\[1\]: expected 0..21, since 3 more", fake=False)
    yield BadCase("rows", broken({15: is_(torch.tensor([5]))}, prompt), r"rows\[0\]: expected 0..4, got 5", fake=False)
    slot = is_(torch.tensor([[0, 1], [4, 0]], dtype=torch.int32))
    yield BadCase("slot", broken({9: slot}), r"mem_slot\[1, 0\]: expected -1 or a slot below 4, got 4", fake=False)


def cost(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, cu_q=None, cu_chunk=None, rows=None, *, formats, activations, ffn,
    memory_layers, heads, span, eps, scale, threads, profile=None,
) -> Cost:  # fmt: skip
    layers, batch, _, kv_heads, dim = k_cache.shape
    cuts = range(batch + 1) if cu_q is None else cu_q.tolist()
    new, have = [end - begin for begin, end in pairwise(cuts)], lengths.tolist()
    seen = sum(n * h + n * (n + 1) // 2 for n, h in zip(new, have, strict=True))  # pairs of a token and a row
    vocab, width = embed.shape
    wanted = batch if rows is None else rows.shape[0]
    body = sum(r * c for r, c in _weight_shapes(layers, heads, kv_heads, dim, width, ffn, vocab)[:-1])
    moved = weights.nbytes + 2 * layers * (sum(have) + sum(new)) * kv_heads * dim * k_cache.element_size()
    moved += wanted * vocab * 4 + norms.nbytes
    flops = 2 * sum(new) * body + 2 * wanted * vocab * width + 4 * layers * seen * heads * dim
    if mem_kv is not None:
        held = mem_len[mem_slot.clamp_min(0).long()].where(mem_slot >= 0, 0).sum(1)
        moved += int(held.sum()) * mem_kv[0, ..., 0, :].numel() * mem_kv.element_size()
        chunks = torch.tensor(cuts) if cu_chunk is None else cu_chunk
        flops += 4 * int((held * chunks.diff()).sum()) * len(memory_layers) * heads * dim
    return Cost(moved, flops)


OP = register(
    Op(
        name="decode_step",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.bfloat16: 1e-2},
        dtypes=(torch.bfloat16,),
        mutates=(2, 3),
    )
)


def decode_step(
    tokens: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    embed: Tensor,
    norms: Tensor,
    rope: Tensor,
    weights: PackedWeights,
    mem_kv: Tensor | None = None,
    mem_slot: Tensor | None = None,
    mem_len: Tensor | None = None,
    mem_bias: Tensor | None = None,
    head_map: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_chunk: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    ffn: int,
    memory_layers: Sequence[int] = (),
    heads: int,
    span: int = 0,
    eps: float,
    scale: float,
    threads: int = 1,
    profile: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """New tokens of every sequence through a whole Llama decoder; their keys and values go into the cache.

    One token each, or with `cu_q` any number: prompts, or text appended to what the cache holds. Forward only.

    docs/ops/decode_step.md. The residual stream is float32; what enters the cache, attention or the linear map of a
    bf16 weight is rounded to bfloat16, what enters other maps as `weights.activations` says. Results do not depend
    on the number of threads.

    Args:
        tokens: int64 [T], those of a sequence after one another; T = B without cu_q.
        lengths: int32 [B], rows of the cache in use before them. Token i of sequence b takes row lengths[b] + i; its
            position is that row + span.
        k_cache, v_cache: bfloat16 [L, B, N, Hkv, D], any strides but the last; changed in place.
        embed: bfloat16 [V, C]; C a multiple of 32.
        norms: float32 [2 L + 1, C]: per layer before attention and before the feed-forward, then before the head.
        rope: float32 [2, positions, D], cos and sin, which carries the sign: x cos + swap_halves(x) sin rotates.
        weights: packed weights end to end (`join_weights`): per layer queries, keys and values [(H + 2 Hkv) D, C],
            output [C, H D], gate and up [2 F, C], down [C, F]; then the head [V, C]. Any mixture of formats.
        mem_kv: bfloat16 [S, Lm, 2, Hm, K, D], records of the memory layers, or None: no memory.
        mem_slot, mem_len, mem_bias, head_map: as in memory_attention, but for bias [S, Lm, Hm, K] and head_map
            [Lm, Hkv]; mem_slot [C, R], a row per chunk.
        cu_q: int32 [B + 1], tokens of sequence b are [cu_q[b], cu_q[b + 1]); None: one each.
        cu_chunk: int32 [C + 1], tokens that read the same records, never of two sequences; None: cu_q.
        rows: int64 [n], tokens whose logits are wanted; None: the last of each sequence, zeros for one without.
        ffn: F, a multiple of 32.
        memory_layers: the Lm layers that read records, ascending.
        heads: query heads.
        eps: of the norms. scale: factor on q . k, usually D ** -0.5.
        threads: at most so many work on it.
        profile: int64 [7] to which nanoseconds per stage are added, as the first thread sees them: embed, norm,
            linear (queries, keys, values, output), attention, ffn, head, wait; or None.

    Returns:
        logits float32 [n, V], n = B without rows; mass float32 [T, R], the probability on each record, mean over
        memory layers and heads (R is 0 without memory).

    Raises:
        RuntimeError: shapes or dtypes do not match, an input requires a gradient, or (CPU) a value of an index tensor
            is out of its range; nothing is written then.
    """
    return OP(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights.data, mem_kv, mem_slot, mem_len, mem_bias,
              head_map, cu_q, cu_chunk, rows, weights.formats, weights.activations, ffn, memory_layers, heads, span,
              eps, scale, threads, profile)  # fmt: skip
