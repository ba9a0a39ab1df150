"""memory_decode: attention of a few new tokens per sequence over its KV cache and its memory records, in one softmax.

The formula of memory_attention (Memory3, arXiv 2407.01178, section 3.2) with one chunk per sequence and keys in a dense
or paged cache.
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
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor? block_table, Tensor cu_q, Tensor mem_k, "
    "Tensor mem_v, Tensor mem_slot, Tensor mem_len, Tensor? mem_bias=None, Tensor? head_map=None, *, "
    "float scale, int max_q, int max_kv) -> (Tensor, Tensor, Tensor)"
)


def check_cache(q, k_cache, v_cache, kv_len, block_table, cu_q, max_q) -> None:
    """Shapes and dtypes of what memory_decode and memory_decode_coded share."""
    args_.expect_index("cu_q", cu_q, -1)
    torch._check(cu_q.shape[0] > 0, lambda: "cu_q: expected at least one offset, got none")
    sequences = cu_q.shape[0] - 1
    args_.expect_shape("k_cache", k_cache, -1, -1, -1, q.shape[-1])
    args_.expect_shape("v_cache", v_cache, *k_cache.shape)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        args_.expect_dtype(name, tensor, q.dtype)
        args_.expect_unit_stride(name, tensor)
    args_.expect_index("kv_len", kv_len, sequences)
    if block_table is None:
        torch._check(
            k_cache.shape[0] == sequences,
            lambda: f"k_cache: expected {sequences} sequences (rows of kv_len), got {k_cache.shape[0]}",
        )
    else:
        args_.expect_index("block_table", block_table, sequences, -1)
        page = k_cache.shape[1]
        torch._check(
            page >= 16 and page & (page - 1) == 0,
            lambda: f"k_cache: expected pages of a power of two of at least 16 tokens, got {page}",
        )
    torch._check(
        max_q <= args_.MAX_DECODE_ROWS,
        lambda: (
            f"max_q: expected at most {args_.MAX_DECODE_ROWS} new tokens per sequence, got {max_q}; "
            "use memory_attention for longer ones"
        ),
    )


def check_cache_values(q, k_cache, kv_len, block_table, cu_q, max_q, max_kv) -> tuple[list[int], list[int]]:
    """cu_q and kv_len as lists, checked in the order of the native launcher."""
    cu_q, kv_len = cu_q.tolist(), kv_len.tolist()
    args_.check_offsets("cu_q", cu_q, q.shape[0], exact=True)
    args_.check_longest("cu_q", cu_q, max_q, "max_q")
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    table = None if block_table is None else block_table.tolist()
    args_.check_cache_values(kv_len, cu_q, capacity, table, page, k_cache.shape[0])
    longest = max(kv_len, default=0)
    if longest > max_kv:
        raise RuntimeError(f"max_kv: expected at least {longest}, the largest kv_len, got {max_kv}")
    return cu_q, kv_len


def cached(k_cache: Tensor, v_cache: Tensor, kv_len: list[int], block_table: Tensor | None):
    """The visible keys and values of sequence b as a function of b."""

    def rows(cache: Tensor, b: int) -> Tensor:
        if block_table is None:
            return cache[b, : kv_len[b]]
        count = -(-kv_len[b] // cache.shape[1])
        return cache[block_table[b, :count].long()].flatten(0, 1)[: kv_len[b]]

    return lambda b: (rows(k_cache, b), rows(v_cache, b))


def result_like(q: Tensor, refs: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = args_.wide_dtype(q.dtype)
    rows, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((rows, heads), dtype=wide),
        q.new_empty((rows, heads, refs), dtype=wide),
    )


def fake(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
):  # fmt: skip
    check_cache(q, k_cache, v_cache, kv_len, block_table, cu_q, max_q)
    chunks, kv_heads = cu_q.shape[0] - 1, k_cache.shape[2]
    args_.check_records(q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, chunks, kv_heads)
    return result_like(q, mem_slot.shape[1])


def reference(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
):  # fmt: skip
    check_cache(q, k_cache, v_cache, kv_len, block_table, cu_q, max_q)
    chunks, kv_heads = cu_q.shape[0] - 1, k_cache.shape[2]
    args_.check_records(q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, chunks, kv_heads)
    rows, lengths = check_cache_values(q, k_cache, kv_len, block_table, cu_q, max_q, max_kv)
    args_.check_slot_values(mem_slot, mem_len, mem_k.shape[2])
    args_.check_head_map(head_map, mem_k.shape[1])
    wide = args_.wide_dtype(q.dtype)
    records = math_.gather_records(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, kv_heads, wide)
    context = cached(k_cache, v_cache, lengths, block_table)
    return math_.attend(q, rows, context, records, rows, mem_slot.shape[1], scale)


def decode_cost(q, k_cache, kv_len, cu_q, mem_slot, mem_len, token_bytes: int) -> Cost:
    """Compulsory traffic and arithmetic; `token_bytes`: one memory token of all record heads, keys and values."""
    rows, heads, dim = q.shape
    new = (cu_q[1:] - cu_q[:-1]).unsqueeze(1)
    length = mem_len[mem_slot.clamp_min(0).long()].where(mem_slot >= 0, 0) if mem_len.numel() else mem_slot * 0
    pairs = int((new.squeeze(1) * kv_len).sum()) + int((new * length).sum())
    context = 2 * int(kv_len.sum()) * k_cache.shape[2] * dim * q.element_size()
    moved = 2 * q.nbytes + context + int(length.sum()) * token_bytes + 4 * rows * heads * (1 + mem_slot.shape[1])
    return Cost(moved, 4 * pairs * heads * dim)


def cost(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
) -> Cost:  # fmt: skip
    token_bytes = 2 * mem_k.shape[1] * mem_k.shape[3] * mem_k.element_size()
    return decode_cost(q, k_cache, kv_len, cu_q, mem_slot, mem_len, token_bytes)


OP = register(
    Op(
        name="memory_decode",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=samples.decode_cases,
        bad_cases=refused.decode_bad_cases,
        cost=cost,
        tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3},
    )
)


def memory_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    block_table: Tensor | None,
    cu_q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None = None,
    head_map: Tensor | None = None,
    *,
    scale: float,
    max_q: int,
    max_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a few new tokens per sequence over its KV cache and its memory records, in one softmax.

    Memory3, arXiv 2407.01178, section 3.2; docs/ops/memory_decode.md. Query i of a sequence with Sq new tokens sees the
    cache rows 0..kv_len-Sq+i and every valid token of the sequence's records. Forward only.

    Args:
        q: [Tq, Hq, D] float32, bfloat16 or float16 (float64 on the reference), rotated; D a multiple of 8 up to 256.
        k_cache, v_cache: q's dtype, any strides but the last; [B, N, Hkv, D] without block_table, else
            [pages, page, Hkv, D] with page a power of two of at least 16.
        kv_len: int32 [B], rows in the cache, the new tokens (already written by the caller) included; 0: memory only.
            Rows past it are never read.
        block_table: int32 [B, max_pages], the pages of each sequence in order, or None.
        cu_q: int32 [B + 1], first row of each sequence in q.
        mem_k, mem_v, mem_len, mem_bias, head_map: as in memory_attention.
        mem_slot: int32 [B, R], the slots each sequence reads; -1: none.
        scale: factor on q . k, usually D ** -0.5.
        max_q: upper bound of the new tokens of one sequence, at most 16.
        max_kv: upper bound of kv_len.

    Returns:
        out [Tq, Hq, D] in q's dtype; lse [Tq, Hq] float32, natural log; mass [Tq, Hq, R] float32, the probability on
        each record. A row that sees nothing: out 0, lse -inf, mass 0.

    Raises:
        RuntimeError: shapes or dtypes do not match, an input requires a gradient, or (CPU) a value of an index tensor
            is out of its range.
    """
    return OP(q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
              scale, max_q, max_kv)  # fmt: skip
