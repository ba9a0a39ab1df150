"""memory_decode_coded: memory_decode on records in the coded format (m3/book.h), decoded as they are read.

Equal to memory_decode on mem_k = vq_dequantize(mem_k_codes), mem_v likewise, in float32. Kernels use
q . (rot^T y) = (rot q) . y and sum p rot^T y = rot^T sum p y: one rotation of the query and one of the memory output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import Cost, Op, register
from ..book import Book
from . import _attention_args as args_
from . import _attention_bad_cases as refused
from . import _attention_cases as samples
from . import _attention_math as math_
from . import _codec as codec
from . import memory_decode as dense_

SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor? block_table, Tensor cu_q, Tensor mem_k_codes, "
    "Tensor mem_v_codes, Tensor mem_slot, Tensor mem_len, Tensor? mem_bias, Tensor? head_map, Tensor k_coarse, "
    "Tensor k_fine, Tensor? k_rot, Tensor v_coarse, Tensor v_fine, Tensor? v_rot, *, "
    "int tokens, float scale, int max_q, int max_kv) -> (Tensor, Tensor, Tensor)"
)


def check_shapes(
    q, k_cache, v_cache, kv_len, block_table, cu_q, k_codes, v_codes, mem_slot, mem_len, mem_bias, head_map,
    k_book: Book, v_book: Book, tokens, max_q,
) -> None:  # fmt: skip
    args_.check_query(q)
    dense_.check_cache(q, k_cache, v_cache, kv_len, block_table, cu_q, max_q)
    for side, book in (("k_", k_book), ("v_", v_book)):
        dim = codec.check_tables(*book, q.dtype, side)
        torch._check(
            dim == q.shape[2],
            lambda side=side, dim=dim: f"{side}coarse: expected codes of vectors of length {q.shape[2]}, got {dim}",
        )
    torch._check(tokens > 0, lambda: f"tokens: expected at least 1, got {tokens}")
    args_.expect_dtype("mem_k_codes", k_codes, torch.uint8)
    args_.expect_dtype("mem_v_codes", v_codes, torch.uint8)
    args_.expect_shape("mem_k_codes", k_codes, -1, -1, codec.record_bytes(k_book.coarse, k_book.fine, tokens))
    slots, heads, _ = k_codes.shape
    args_.expect_shape("mem_v_codes", v_codes, slots, heads, codec.record_bytes(v_book.coarse, v_book.fine, tokens))
    args_.expect_unit_stride("mem_k_codes", k_codes)
    args_.expect_unit_stride("mem_v_codes", v_codes)
    args_.check_heads(q, args_.check_index_heads(heads, head_map, k_cache.shape[2]))
    args_.check_slots(q, mem_slot, mem_len, mem_bias, cu_q.shape[0] - 1, slots, heads, tokens)


def fake(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias, head_map,
    k_coarse, k_fine, k_rot, v_coarse, v_fine, v_rot, *, tokens, scale, max_q, max_kv,
):  # fmt: skip
    check_shapes(q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias,
                 head_map, Book(k_coarse, k_fine, k_rot), Book(v_coarse, v_fine, v_rot), tokens, max_q)  # fmt: skip
    return dense_.result_like(q, mem_slot.shape[1])


def decode_slots(codes: Tensor, slot: Tensor, book: Book, tokens: int, dtype: torch.dtype) -> Tensor:
    """codes [S, Hm, G] of the slots [N] -> [N, Hm, K, D]."""
    width = codec.code_bytes(book.coarse, book.fine)
    picked = codes[slot][..., : tokens * width].unflatten(-1, (tokens, width))
    return codec.decode(picked, *book, dtype)


def reference(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias, head_map,
    k_coarse, k_fine, k_rot, v_coarse, v_fine, v_rot, *, tokens, scale, max_q, max_kv,
):  # fmt: skip
    k_book, v_book = Book(k_coarse, k_fine, k_rot), Book(v_coarse, v_fine, v_rot)
    check_shapes(q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias,
                 head_map, k_book, v_book, tokens, max_q)  # fmt: skip
    rows, lengths = dense_.check_cache_values(q, k_cache, kv_len, block_table, cu_q, max_q, max_kv)
    args_.check_slot_values(mem_slot, mem_len, tokens)
    args_.check_head_map(head_map, mem_k_codes.shape[1])
    wide, kv_heads, refs = args_.wide_dtype(q.dtype), k_cache.shape[2], mem_slot.shape[1]
    if mem_k_codes.shape[0] == 0:
        mem_k = mem_v = q.new_zeros((0, mem_k_codes.shape[1], tokens, q.shape[2]))
    else:  # a small arena of the listed records alone
        listed = mem_slot.clamp_min(0).long().flatten()
        mem_k, mem_v = (
            decode_slots(codes, listed, book, tokens, wide)
            for codes, book in ((mem_k_codes, k_book), (mem_v_codes, v_book))
        )
        mem_len, mem_bias = mem_len[listed], None if mem_bias is None else mem_bias[listed]
        places = torch.arange(listed.shape[0], dtype=torch.int32, device=q.device).reshape(mem_slot.shape)
        mem_slot = places.where(mem_slot >= 0, -1)
    records = math_.gather_records(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, kv_heads, wide)
    context = dense_.cached(k_cache, v_cache, lengths, block_table)
    return math_.attend(q, rows, context, records, rows, refs, scale)


def cost(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias, head_map,
    k_coarse, k_fine, k_rot, v_coarse, v_fine, v_rot, *, tokens, scale, max_q, max_kv,
) -> Cost:  # fmt: skip
    token_bytes = (codec.code_bytes(k_coarse, k_fine) + codec.code_bytes(v_coarse, v_fine)) * mem_k_codes.shape[1]
    dense = dense_.decode_cost(q, k_cache, kv_len, cu_q, mem_slot, mem_len, token_bytes)
    length = mem_len[mem_slot.clamp_min(0).long()].where(mem_slot >= 0, 0) if mem_len.numel() else mem_slot * 0
    vectors = int(length.sum()) * mem_k_codes.shape[1]
    # Every table once, or the entries in use where they are fewer.
    entries = sum(
        min(t.nbytes, vectors * t.shape[0] * t.shape[2] * t.element_size())
        for t in (k_coarse, k_fine, v_coarse, v_fine)
    )
    rotations = sum(r is not None for r in (k_rot, v_rot))
    return Cost(
        dense.bytes + entries + rotations * 4 * q.shape[2] ** 2,
        dense.flops + 2 * vectors * q.shape[2] + rotations * 2 * q.numel() * q.shape[2],
    )


OP = register(
    Op(
        name="memory_decode_coded",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=samples.coded_cases,
        bad_cases=refused.coded_bad_cases,
        cost=cost,
        tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3},
    )
)


def memory_decode_coded(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    block_table: Tensor | None,
    cu_q: Tensor,
    mem_k_codes: Tensor,
    mem_v_codes: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None = None,
    head_map: Tensor | None = None,
    *,
    k_book: Book,
    v_book: Book,
    tokens: int,
    scale: float,
    max_q: int,
    max_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """memory_decode on coded records (Memory3, arXiv 2407.01178, section 3.3; docs/ops/memory_decode_coded.md).

    Equal to memory_decode on the decoded records in float32, without writing them anywhere. Forward only.

    Args:
        q, k_cache, v_cache, kv_len, block_table, cu_q, mem_slot, mem_len, mem_bias, head_map, scale, max_q, max_kv: as
            in memory_decode.
        mem_k_codes, mem_v_codes: [S, Hm, G] uint8, any strides but the last; token j of a record head at byte
            j * code_bytes, G = ceil16(tokens * code_bytes) of the side's book.
        k_book, v_book: the codebooks of keys and values, for vectors of length D (vq_dequantize has the format).
        tokens: K, tokens per record.

    Returns:
        out [Tq, Hq, D] in q's dtype; lse [Tq, Hq] float32, natural log; mass [Tq, Hq, R] float32.

    Raises:
        RuntimeError: shapes or dtypes do not match, an input requires a gradient, or (CPU) a value of an index tensor
            is out of its range.
    """
    return OP(q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias,
              head_map, *k_book, *v_book, tokens, scale, max_q, max_kv)  # fmt: skip
