"""memory_attention: prefill attention in which every chunk of queries also reads a set of memory records.

Memory3, arXiv 2407.01178, section 3.2: the retrieved memories' keys and values stand beside those of the context and
take part in one softmax, without causal mask. For a query row i of chunk c and query head h:
    s_j = scale * q_i . k_j (+ bias_j for memory tokens),   p = softmax over visible context and memory tokens,
    out = sum_j p_j v_j,   lse = log sum_j exp(s_j),   mass_r = sum of p over the tokens of record r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import Cost, Op, register
from . import _attention_args as args_
from . import _attention_bad_cases as refused
from . import _attention_cases as samples
from . import _attention_math as math_

SCHEMA = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor cu_q, Tensor cu_k, Tensor cu_chunk, Tensor mem_k, Tensor mem_v, "
    "Tensor mem_slot, Tensor mem_len, Tensor? mem_bias=None, Tensor? head_map=None, *, "
    "float scale, int max_q, int max_k, int max_chunk) -> (Tensor, Tensor, Tensor)"
)


def check_shapes(q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map) -> None:
    torch._check((k is None) == (v is None), lambda: "v: expected k and v both given or both None, got one of them")
    args_.expect_index("cu_q", cu_q, -1)
    args_.expect_index("cu_k", cu_k, cu_q.shape[0])
    args_.expect_index("cu_chunk", cu_chunk, -1)
    for name, offsets in (("cu_q", cu_q), ("cu_chunk", cu_chunk)):
        torch._check(offsets.shape[0] > 0, lambda name=name: f"{name}: expected at least one offset, got none")
    chunks = cu_chunk.shape[0] - 1
    kv_heads = None if k is None else k.shape[1] if k.dim() == 3 else -1
    if k is not None:
        args_.expect_shape("k", k, -1, -1, q.shape[-1])
        args_.expect_shape("v", v, *k.shape)
        for name, tensor in (("k", k), ("v", v)):
            args_.expect_dtype(name, tensor, q.dtype)
            args_.expect_unit_stride(name, tensor)
    args_.check_records(q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, chunks, kv_heads)


def check_values(
    q, k, cu_q, cu_k, cu_chunk, mem_k, mem_slot, mem_len, head_map, max_q, max_k, max_chunk
) -> tuple[list[int], list[int], list[int]]:
    """The offsets as lists, checked in the order of the native launcher."""
    cu_q, cu_k, cu_chunk = cu_q.tolist(), cu_k.tolist(), cu_chunk.tolist()
    args_.check_offsets("cu_q", cu_q, q.shape[0], exact=True)
    args_.check_longest("cu_q", cu_q, max_q, "max_q")
    if k is not None:
        args_.check_offsets("cu_k", cu_k, k.shape[0], exact=False)
        args_.check_longest("cu_k", cu_k, max_k, "max_k")
        args_.check_pairs(cu_q, cu_k)
    args_.check_offsets("cu_chunk", cu_chunk, q.shape[0], exact=True)
    args_.check_longest("cu_chunk", cu_chunk, max_chunk, "max_chunk")
    args_.check_boundaries(cu_q, cu_chunk)
    args_.check_slot_values(mem_slot, mem_len, mem_k.shape[2])
    args_.check_head_map(head_map, mem_k.shape[1])
    return cu_q, cu_k, cu_chunk


def kv_heads_of(k: Tensor | None, mem_k: Tensor, head_map: Tensor | None) -> int:
    if k is not None:
        return k.shape[1]
    return mem_k.shape[1] if head_map is None else head_map.shape[0]


def fake(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
):  # fmt: skip
    check_shapes(q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)
    wide = args_.wide_dtype(q.dtype)
    rows, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((rows, heads), dtype=wide),
        q.new_empty((rows, heads, mem_slot.shape[1]), dtype=wide),
    )


def reference(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
):  # fmt: skip
    check_shapes(q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)
    cu_q, cu_k, cu_chunk = check_values(
        q, k, cu_q, cu_k, cu_chunk, mem_k, mem_slot, mem_len, head_map, max_q, max_k, max_chunk
    )
    records = math_.gather_records(
        mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, kv_heads_of(k, mem_k, head_map), args_.wide_dtype(q.dtype)
    )
    context = None if k is None else lambda b: (k[cu_k[b] : cu_k[b + 1]], v[cu_k[b] : cu_k[b + 1]])
    return math_.attend(q, cu_q, context, records, cu_chunk, mem_slot.shape[1], scale)


def setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    out, lse, mass = output
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(*inputs, out, lse)
    ctx.sizes = dict(keyword_only_inputs)


def backward(ctx, grad_out: Tensor, grad_lse: Tensor, grad_mass: Tensor):
    *inputs, out, lse = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, *[False] * len(inputs))  # the dispatcher drops trailing arguments left at None
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map = inputs
    grads = torch.ops.memory3.memory_attention_backward(
        grad_out, grad_lse, out, lse, *inputs, memory_grad=needs[6] or needs[7] or needs[10], **ctx.sizes
    )
    present = {0: q, 1: k, 2: v, 6: mem_k, 7: mem_v, 10: mem_bias}
    found = dict(zip(present, grads, strict=True))
    return tuple(found[i] if needs[i] and present.get(i) is not None else None for i in range(len(inputs)))


def cost(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
) -> Cost:  # fmt: skip
    rows, heads, dim = q.shape
    pairs = sum(
        (b - a) * (d - c) - (b - a) * (b - a - 1) // 2
        for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
        if k is not None
    )
    chunk_rows = (cu_chunk[1:] - cu_chunk[:-1]).unsqueeze(1)
    length = mem_len[mem_slot.clamp_min(0).long()].where(mem_slot >= 0, 0) if mem_len.numel() else mem_slot * 0
    pairs += int((chunk_rows * length).sum())
    read = 2 * int(length.sum()) * mem_k.shape[1] * dim * q.element_size()
    moved = 2 * q.nbytes + (2 * k.nbytes if k is not None else 0) + read + 4 * rows * heads * (1 + mem_slot.shape[1])
    return Cost(moved, 4 * pairs * heads * dim)


OP = register(
    Op(
        name="memory_attention",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=samples.attention_cases,
        bad_cases=refused.attention_bad_cases,
        cost=cost,
        tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3},
        setup_context=setup_context,
        backward=backward,
    )
)


def memory_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    cu_chunk: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None = None,
    head_map: Tensor | None = None,
    *,
    scale: float,
    max_q: int,
    max_k: int,
    max_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over packed sequences whose query chunks also read memory records, in one softmax.

    Memory3, arXiv 2407.01178, section 3.2; docs/ops/memory_attention.md. Query i of a sequence with Sq query and Sk key
    rows sees the keys 0..Sk-Sq+i and every valid token of its chunk's records. Differentiable in q, k, v, mem_k,
    mem_v and mem_bias, through out and lse; mass carries no gradient. Gradients are deterministic: a slot read by
    several chunks sums over them in ascending order.

    Args:
        q: [Tq, Hq, D] float32, bfloat16 or float16 (float64 on the reference), rotated; D a multiple of 8 up to 256.
        k, v: [Tk, Hkv, D], q's dtype, k rotated; Hq a multiple of Hkv. Both None: rows read memory only, and cu_k's
            values are not used.
        cu_q, cu_k: int32 [B + 1], first row of each sequence in q and in k; a sequence has at least as many keys as
            queries.
        cu_chunk: int32 [C + 1], first query row of each chunk; every value of cu_q is one of its boundaries.
        mem_k, mem_v: [S, Hm, K, D], q's dtype: records by arena slot, any strides but the last.
        mem_slot: int32 [C, R], the slots chunk c reads; -1: none. A slot listed twice counts twice.
        mem_len: int32 [S], valid tokens per slot, 0..K; later tokens are never read.
        mem_bias: float32 [S, Hm, K], in natural-log units, added to the scaled score; -inf removes the token.
        head_map: int32 [Hkv], the record head that each KV head reads, -1: none. None: head i reads head i (Hm = Hkv).
        scale: factor on q . k, usually D ** -0.5.
        max_q, max_k, max_chunk: upper bounds of the rows of one sequence in q, in k, and of one chunk.

    Returns:
        out [Tq, Hq, D] in q's dtype; lse [Tq, Hq] float32, natural log; mass [Tq, Hq, R] float32, the probability on
        each record. A row that sees nothing: out 0, lse -inf, mass 0.

    Raises:
        RuntimeError: shapes or dtypes do not match, or (CPU) a value of an index tensor is out of its range.
    """
    return OP(q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
              scale, max_q, max_k, max_chunk)  # fmt: skip
