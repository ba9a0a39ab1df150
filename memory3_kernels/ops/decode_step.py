"""decode_step: one new token per sequence through a whole Llama decoder, in one call (docs/ops/decode_step.md).

Attention over cache and records as memory_decode (Memory3, arXiv 2407.01178, section 3.2), linear maps as
packed_linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ..packed import BLOCK, FORMATS, LETTERS, TILE, PackedWeights, join_weights, pack_weight, tile_bytes, unpack_weight
from . import memory_decode as attention
from ._attention_args import check_head_map, check_slot_values
from ._checks import check_range, expect_dtype, expect_shape, expect_unit_stride

SCHEMA = (
    "(Tensor tokens, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor embed, Tensor norms, Tensor rope, "
    "Tensor weights, Tensor? mem_kv=None, Tensor? mem_slot=None, Tensor? mem_len=None, Tensor? mem_bias=None, "
    "Tensor? head_map=None, *, str formats, int ffn, int[] memory_layers, int heads, int span, float eps, float scale, "
    "int threads, Tensor(c!)? profile=None) -> (Tensor, Tensor)"
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
    formats, ffn, memory_layers, heads, threads, profile,
) -> list[tuple[int, int, str]]:  # fmt: skip
    """Shapes and dtypes; rows, columns and format of every weight."""
    expect_shape("k_cache", k_cache, -1, -1, -1, -1, -1)
    layers, batch, _, kv_heads, dim = k_cache.shape
    wide = k_cache.dtype is torch.float64
    element, exact = (torch.float64, torch.float64) if wide else (torch.bfloat16, torch.float32)
    expect_shape("v_cache", v_cache, *k_cache.shape)
    expect_shape("tokens", tokens, batch)
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
        expect_shape("mem_slot", mem_slot, batch, -1)
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


def _results(tokens: Tensor, embed: Tensor, mem_kv: Tensor | None, mem_slot: Tensor | None) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if embed.dtype is torch.float64 else torch.float32
    refs = 0 if mem_kv is None else mem_slot.shape[1]
    batch = tokens.shape[0]
    return (
        tokens.new_empty((batch, embed.shape[0]), dtype=exact),
        tokens.new_empty((batch, refs), dtype=exact),
    )


def fake(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, *, formats, ffn, memory_layers, heads, span, eps, scale, threads, profile=None,
):  # fmt: skip
    _check(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv, mem_slot, mem_len, mem_bias,
           head_map, formats, ffn, memory_layers, heads, threads, profile)  # fmt: skip
    return _results(tokens, embed, mem_kv, mem_slot)


def _check_values(tokens, lengths, k_cache, embed, rope, mem_kv, mem_slot, mem_len, head_map, memory_layers, span):
    check_range("tokens", tokens, 0, embed.shape[0] - 1)
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length < k_cache.shape[2]:
            raise RuntimeError(f"lengths[{b}]: expected 0..{k_cache.shape[2] - 1}, the cache's last row, got {length}")
        if not 0 <= length + span < rope.shape[1]:
            raise RuntimeError(
                f"lengths[{b}]: expected a position below {rope.shape[1]}, the rows of rope, got {length} + span {span}"
            )
    if mem_kv is None:
        return
    for i, layer in enumerate(memory_layers):
        if not 0 <= layer < k_cache.shape[0] or (i and layer <= memory_layers[i - 1]):
            raise RuntimeError(f"memory_layers[{i}]: expected ascending layers below {k_cache.shape[0]}, got {layer}")
    check_slot_values(mem_slot, mem_len, mem_kv.shape[4])
    for row in head_map if head_map is not None else ():
        check_head_map(row, mem_kv.shape[3])


def reference(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, *, formats, ffn, memory_layers, heads, span, eps, scale, threads, profile=None,
):  # fmt: skip
    shapes = _check(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv, mem_slot, mem_len,
                    mem_bias, head_map, formats, ffn, memory_layers, heads, threads, profile)  # fmt: skip
    _check_values(tokens, lengths, k_cache, embed, rope, mem_kv, mem_slot, mem_len, head_map, memory_layers, span)
    layers, batch, capacity, kv_heads, dim = k_cache.shape
    exact, element = norms.dtype, k_cache.dtype
    logits, mass = _results(tokens, embed, mem_kv, mem_slot)
    mass.zero_()

    begins = [0, *accumulate(_weight_bytes(*shape) for shape in shapes)]

    def linear(x: Tensor, index: int) -> Tensor:
        rows, cols, format = shapes[index]
        packed = weights[begins[index] : begins[index + 1]].view(-1, tile_bytes(cols, format))
        return x.to(element).to(exact) @ unpack_weight(packed, rows, cols, format, exact).T

    def norm(x: Tensor, index: int) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norms[index]

    def rotate(x: Tensor) -> Tensor:
        return x * turn[0] + x.roll(dim // 2, -1) * turn[1]

    at = lengths.long()
    turn = rope[:, at + span].unsqueeze(2)
    new = torch.arange(batch)
    cu = torch.arange(batch + 1, dtype=torch.int32)
    x = embed[tokens].to(exact)
    for layer in range(layers):
        first = PER_LAYER * layer
        qkv = linear(norm(x, 2 * layer), first).view(batch, heads + 2 * kv_heads, dim)
        k_cache[layer, new, at] = rotate(qkv[:, heads : heads + kv_heads]).to(element)
        v_cache[layer, new, at] = qkv[:, heads + kv_heads :].to(element)
        if mem_kv is not None and layer in memory_layers:
            i = memory_layers.index(layer)
            bias, map_ = (None if t is None else t for t in (mem_bias, head_map))
            records = (mem_kv[:, i, 0], mem_kv[:, i, 1], mem_slot, mem_len,
                       None if bias is None else bias[:, i], None if map_ is None else map_[i])  # fmt: skip
        else:
            none = k_cache.new_empty((0, kv_heads, 1, dim))
            records = (none, none, cu.new_empty((batch, 0)), cu.new_empty(0), None, None)
        attended, _, seen = attention.reference(
            rotate(qkv[:, :heads]).to(element), k_cache[layer], v_cache[layer], lengths + 1, None, cu, *records,
            scale=scale, max_q=1, max_kv=capacity,
        )  # fmt: skip
        if seen.shape[-1]:
            mass += seen.mean(1) / len(memory_layers)
        x = x + linear(attended.flatten(1), first + 1)
        gate, up = linear(norm(x, 2 * layer + 1), first + 2).chunk(2, -1)
        x = x + linear(gate * gate.sigmoid() * up, first + 3)
    logits.copy_(linear(norm(x, 2 * layers), PER_LAYER * layers))
    return logits, mass


def _sample(batch, layers=2, heads=4, kv_heads=2, dim=16, width=64, ffn=96, vocab=50, format="bf16", memory=(),
            refs=2, bias=False, mapped=False, lengths=None, capacity=24, threads=1, span=0):  # fmt: skip
    def make(dtype: torch.dtype, generator: torch.Generator):
        element, exact = (torch.float64, torch.float64) if dtype is torch.float64 else (torch.bfloat16, torch.float32)

        def draw(*size, factor=1.0, to=element):
            return (torch.randn(*size, generator=generator, dtype=torch.float32) * factor).to(torch.bfloat16).to(to)

        wide = heads * dim
        shapes = [(wide + 2 * kv_heads * dim, width), (width, wide), (2 * ffn, width), (width, ffn)] * layers
        formats = [format] * len(shapes) + ["q8_0" if format == "q4_1" else format]
        weights, _ = join_weights([
            pack_weight(draw(rows, cols, factor=cols**-0.5, to=torch.float32), name)
            for name, (rows, cols) in zip(formats, [*shapes, (vocab, width)], strict=True)
        ])  # fmt: skip
        have = [(7 * b + 5) % capacity for b in range(batch)] if lengths is None else lengths
        angle = torch.outer(torch.arange(capacity + span), 50.0 ** -(torch.arange(dim // 2) * 2 / dim)).to(exact)
        args = [
            torch.randint(0, vocab, (batch,), generator=generator), torch.tensor(have, dtype=torch.int32),
            draw(layers, batch, capacity, kv_heads, dim), draw(layers, batch, capacity, kv_heads, dim),
            draw(vocab, width), 1 + draw(2 * layers + 1, width, factor=0.1, to=exact),
            torch.stack((torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1))),
            weights.data,
        ]  # fmt: skip
        if memory:
            held = 1 if mapped else kv_heads
            slot = torch.randint(-1, 4, (batch, refs), generator=generator, dtype=torch.int32)
            args += [draw(4, len(memory), 2, held, 3, dim), slot, torch.tensor([3, 1, 0, 2], dtype=torch.int32)]
            args += [draw(4, len(memory), held, 3, to=exact) if bias else None]
            args += [torch.randint(-1, 1, (len(memory), kv_heads), generator=generator, dtype=torch.int32)
                     if mapped else None]  # fmt: skip
        kwargs = {"memory_layers": list(memory), "heads": heads, "span": span, "eps": 1e-5, "scale": dim**-0.5}
        return tuple(args), {**kwargs, "formats": weights.formats, "ffn": ffn, "threads": threads}

    return make


def cases():
    for format in FORMATS:
        yield Case(f"B1-{format}", _sample(1, format=format))
        yield Case(f"B3-memory-{format}", _sample(3, format=format, memory=(1,), span=5, threads=2))
    yield Case("B2-memory-bias", _sample(2, memory=(0, 1), bias=True, threads=2))
    yield Case("B2-memory-heads", _sample(2, layers=3, memory=(0, 2), bias=True, mapped=True))
    yield Case("B2-no-refs", _sample(2, memory=(0,), refs=0))
    yield Case("B5-first-token-D8", _sample(5, dim=8, heads=12, kv_heads=4, lengths=[0, 0, 3, 23, 1], threads=3))
    yield Case("B2-D64-one-kv-head", _sample(2, layers=1, dim=64, heads=3, kv_heads=1, vocab=33))
    yield Case("B20-many-rows", _sample(20, format="q4_1", memory=(0,), threads=2))
    yield Case("L0", _sample(2, layers=0))
    yield Case("B0", _sample(0))
    for batch in (1, 8):
        for format in FORMATS:
            yield Case(
                f"smollm2_B{batch}_N256-{format}",
                _sample(batch, 30, 9, 3, 64, 576, 1536, 49152, format, lengths=[250] * batch, capacity=256),
                slow=True, bench=True,
            )  # fmt: skip


def bad_cases():
    def broken(change=None, **changes):
        def make():
            args, kwargs = _sample(2, memory=(1,), lengths=[3, 4])(torch.bfloat16, torch.Generator().manual_seed(0))
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
    yield BadCase("ffn", broken(ffn=90), "ffn: expected a multiple of 32, got 90")
    yield BadCase("heads", broken(heads=6), "weights: expected .* bytes")
    yield BadCase("threads", broken(threads=0), "threads: expected 1 to 256, got 0")
    yield BadCase("slot-missing", broken({9: is_(None)}), "mem_kv: expected mem_slot and mem_len with it, got None")
    yield BadCase("layers", broken(memory_layers=[0, 1]), r"mem_kv: expected shape \[\*, 2, 2, \*, \*, 16\]")
    yield BadCase("profile", broken(profile=torch.zeros(3, dtype=torch.int64)), r"profile: expected shape \[7\]")
    high = torch.tensor([1, 50])
    yield BadCase("token", broken({0: is_(high)}), r"tokens\[1\]: expected 0..49, got 50", fake=False)
    yield BadCase(
        "length", broken({1: int32(3, 24)}), r"lengths\[1\]: expected 0..23, the cache's last row", fake=False
    )
    yield BadCase("position", broken(span=20), r"lengths\[1\]: expected a position below 24, .* got 4 \+ span 20",
                  fake=False)  # fmt: skip
    yield BadCase("memory-layer", broken(memory_layers=[2]), r"memory_layers\[0\]: .* below 2, got 2", fake=False)
    slot = is_(torch.tensor([[0, 1], [4, 0]], dtype=torch.int32))
    yield BadCase("slot", broken({9: slot}), r"mem_slot\[1, 0\]: expected -1 or a slot below 4, got 4", fake=False)


def cost(
    tokens, lengths, k_cache, v_cache, embed, norms, rope, weights, mem_kv=None, mem_slot=None, mem_len=None,
    mem_bias=None, head_map=None, *, formats, ffn, memory_layers, heads, span, eps, scale, threads, profile=None,
) -> Cost:  # fmt: skip
    layers, batch, _, kv_heads, dim = k_cache.shape
    rows = int(lengths.sum()) + batch
    vocab, width = embed.shape
    parameters = sum(r * c for r, c in _weight_shapes(layers, heads, kv_heads, dim, width, ffn, vocab))
    moved = weights.nbytes + 2 * layers * rows * kv_heads * dim * k_cache.element_size()
    moved += batch * embed.shape[0] * 4 + norms.nbytes
    flops = 2 * batch * parameters + 4 * layers * rows * heads * dim
    if mem_kv is not None:
        held = int(mem_len[mem_slot.clamp_min(0).long()].where(mem_slot >= 0, 0).sum())
        moved += held * mem_kv[0, ..., 0, :].numel() * mem_kv.element_size()
        flops += 4 * held * len(memory_layers) * heads * dim
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
    """One new token per sequence through a whole Llama decoder; its keys and values go into the cache. Forward only.

    docs/ops/decode_step.md. The residual stream is float32; what enters a linear map, the cache or attention is
    rounded to bfloat16. Results do not depend on the number of threads.

    Args:
        tokens: int64 [B].
        lengths: int32 [B], rows of the cache in use before this token, which takes row lengths[b]. Its position is
            lengths[b] + span.
        k_cache, v_cache: bfloat16 [L, B, N, Hkv, D], any strides but the last; changed in place.
        embed: bfloat16 [V, C]; C a multiple of 32.
        norms: float32 [2 L + 1, C]: per layer before attention and before the feed-forward, then before the head.
        rope: float32 [2, positions, D], cos and sin, which carries the sign: x cos + swap_halves(x) sin rotates.
        weights: packed weights end to end (`join_weights`): per layer queries, keys and values [(H + 2 Hkv) D, C],
            output [C, H D], gate and up [2 F, C], down [C, F]; then the head [V, C]. Any mixture of formats.
        mem_kv: bfloat16 [S, Lm, 2, Hm, K, D], records of the memory layers, or None: no memory.
        mem_slot, mem_len, mem_bias, head_map: as in memory_decode, but for bias [S, Lm, Hm, K] and head_map [Lm, Hkv].
        ffn: F, a multiple of 32.
        memory_layers: the Lm layers that read records, ascending.
        heads: query heads.
        eps: of the norms. scale: factor on q . k, usually D ** -0.5.
        threads: at most so many work on it.
        profile: int64 [7] to which nanoseconds per stage are added, as the first thread sees them: embed, norm,
            linear (queries, keys, values, output), attention, ffn, head, wait; or None.

    Returns:
        logits float32 [B, V]; mass float32 [B, R], the probability on each record, mean over memory layers and heads
        (R is 0 without memory).

    Raises:
        RuntimeError: shapes or dtypes do not match, an input requires a gradient, or (CPU) a value of an index tensor
            is out of its range; nothing is written then.
    """
    return OP(tokens, lengths, k_cache, v_cache, embed, norms, rope, weights.data, mem_kv, mem_slot, mem_len, mem_bias,
              head_map, formats=weights.formats, ffn=ffn, memory_layers=memory_layers, heads=heads, span=span, eps=eps,
              scale=scale, threads=threads, profile=profile)  # fmt: skip
