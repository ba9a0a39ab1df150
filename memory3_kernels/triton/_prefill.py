"""What memory_attention and its backward share: rows of chunks, the sequence of a chunk, arguments.

Rows are packed: the G query heads of one KV head, query row by query row; row // G is the query, row % G the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.memory_attention import kv_heads_of
from ._decode import RECORD_STRIDES, record_arguments
from ._launch import divide, power_of_two, vector


@triton.jit
def chunk_rows(cu_chunk, c, row, G: tl.constexpr):
    """The query rows (int64) of packed rows `row` of chunk c, and whether the chunk has them."""
    start = tl.load(cu_chunk + c)
    return (start + row // G).to(tl.int64), row < (tl.load(cu_chunk + c + 1) - start) * G


@triton.jit
def record_head(head_map, h, mem_heads, MAPPED: tl.constexpr):
    """The record head that KV head h reads; -1 for none, also where it is out of range."""
    head = h
    if MAPPED:
        head = tl.load(head_map + h)
    return tl.where(head < mem_heads, head, -1)


@triton.jit
def sequence_of(cu_q, start, sequences, SEARCH: tl.constexpr):
    """The sequence that query row `start` belongs to: how many end at or before it."""
    b = 0
    for first in range(0, sequences, SEARCH):
        i = first + tl.arange(0, SEARCH)
        end = tl.load(cu_q + 1 + i, mask=i < sequences, other=0)
        b += tl.sum(((end <= start) & (i < sequences)).to(tl.int32), 0)
    return b


@triton.jit
def visible_keys(cu_q, cu_k, start, sequences):
    """Of the sequence of query row `start`: its first key, and how many keys before its own that row sees."""
    b = sequence_of(cu_q, start, sequences, 128)
    first_query, first_key = tl.load(cu_q + b), tl.load(cu_k + b)
    keys, queries = tl.load(cu_k + b + 1) - first_key, tl.load(cu_q + b + 1) - first_query
    return first_key.to(tl.int64), keys - queries + start - first_query


@triton.jit
def load_rows(rows, d, there, D: tl.constexpr, MASKED: tl.constexpr):
    """The vectors that begin at the pointers `rows` [N]: [N, DP], zeros outside. Not MASKED: all rows are there."""
    if MASKED:
        tile = tl.load(rows[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif D < d.shape[0]:
        tile = tl.load(rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(rows[:, None] + d[None, :])
    return tile


STRIDES = ("q_row", "q_head", "kc_row", "kc_head", "vc_row", "vc_head", *RECORD_STRIDES)


def arguments(q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map) -> tuple[dict, dict]:
    """(arguments, constants) that the forward and the backward kernels share; tiles are left to them."""
    kv_heads = kv_heads_of(k, mem_k, head_map)
    key, value = (q, q) if k is None else (k, v)
    step = vector(q, key, value, mem_k, mem_v)
    args = {"q": q, "k": key, "v": value, "cu_q": cu_q.contiguous(), "cu_k": cu_k.contiguous()}
    args |= {"cu_chunk": cu_chunk.contiguous(), "kv_heads": kv_heads, "chunks": cu_chunk.shape[0] - 1}
    args |= {"sequences": cu_q.shape[0] - 1, "q_row": q.stride(0), "q_head": q.stride(1)}
    args |= {"kc_row": key.stride(0), "kc_head": key.stride(1), "vc_row": value.stride(0), "vc_head": value.stride(1)}
    token_strides = (mem_k.stride(2), mem_v.stride(2))
    args |= record_arguments(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, token_strides)
    divide(args, step, *STRIDES)
    constants = {"G": q.shape[1] // kv_heads, "D": q.shape[2], "DP": power_of_two(q.shape[2], 16)}
    constants |= {"CONTEXT": k is not None, "K": mem_k.shape[2], "BIAS": mem_bias is not None, "VECTOR": step}
    # Three products in tf32 are as good as one in float32, and tensor cores have them.
    constants |= {"MAPPED": head_map is not None, "PRECISION": "tf32x3" if q.dtype is torch.float32 else "tf32"}
    return args, constants
