"""Argument checks shared by the attention ops. Shape and dtype checks run under fake tensors too; value checks read the
index tensors and raise the messages of csrc/common/attention_checks.h word for word."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import expect_dtype, expect_floating, expect_shape, expect_unit_stride

MAX_DIM = 256
MAX_DECODE_ROWS = 16


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, lse and mass are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def expect_index(name: str, tensor: Tensor, *shape: int) -> None:
    expect_shape(name, tensor, *shape)
    expect_dtype(name, tensor, torch.int32)


def check_query(q: Tensor) -> None:
    expect_shape("q", q, -1, -1, -1)
    expect_floating("q", q)
    dim = q.shape[2]
    torch._check(
        dim % 8 == 0 and 8 <= dim <= MAX_DIM,
        lambda: f"q: expected a head dimension that is a multiple of 8 up to {MAX_DIM}, got {dim}",
    )
    expect_unit_stride("q", q)


def check_heads(q: Tensor, kv_heads: int) -> None:
    torch._check(
        kv_heads > 0 and q.shape[1] % kv_heads == 0 and q.shape[1] // kv_heads > 0,
        lambda: f"q: expected a number of heads that is a multiple of the {kv_heads} KV heads, got {q.shape[1]}",
    )


def check_index_heads(mem_heads: int, head_map: Tensor | None, kv_heads: int | None) -> int:
    """Checks `head_map` and returns the number of KV heads (given by k, else by head_map, else by the records)."""
    if kv_heads is None:
        kv_heads = mem_heads if head_map is None else head_map.shape[0]
    if head_map is None:
        torch._check(
            mem_heads == kv_heads,
            lambda: (
                f"head_map: expected one where records have {mem_heads} heads and the model {kv_heads} KV heads, "
                "got None"
            ),
        )
    else:
        expect_index("head_map", head_map, kv_heads)
    return kv_heads


def check_records(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None,
    head_map: Tensor | None,
    chunks: int,
    kv_heads: int | None,
) -> None:
    """Shapes and dtypes of q and of the dense memory operands; kv_heads None: k is None."""
    check_query(q)
    expect_shape("mem_k", mem_k, -1, -1, -1, q.shape[2])
    expect_shape("mem_v", mem_v, *mem_k.shape)
    slots, mem_heads, tokens, _ = mem_k.shape
    for name, tensor in (("mem_k", mem_k), ("mem_v", mem_v)):
        expect_dtype(name, tensor, q.dtype)
        expect_unit_stride(name, tensor)
    check_heads(q, check_index_heads(mem_heads, head_map, kv_heads))
    check_slots(q, mem_slot, mem_len, mem_bias, chunks, slots, mem_heads, tokens)


def check_slots(
    q: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None,
    chunks: int,
    slots: int,
    mem_heads: int,
    tokens: int,
) -> None:
    expect_index("mem_slot", mem_slot, chunks, -1)
    expect_index("mem_len", mem_len, slots)
    if mem_bias is not None:
        expect_shape("mem_bias", mem_bias, slots, mem_heads, tokens)
        expect_dtype("mem_bias", mem_bias, wide_dtype(q.dtype))
        expect_unit_stride("mem_bias", mem_bias)


# ---- values of the index tensors -------------------------------------------------------------------------------------


def _fail(message: str) -> None:
    raise RuntimeError(message)


def check_offsets(name: str, offsets: list[int], rows: int, exact: bool) -> None:
    """`offsets` starts at 0, never falls and ends at `rows` (or before, unless `exact`)."""
    if offsets[0] != 0:
        _fail(f"{name}[0]: expected 0, got {offsets[0]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            _fail(f"{name}[{i}]: expected at least {name}[{i - 1}] = {offsets[i - 1]}, got {offsets[i]}")
    last = len(offsets) - 1
    if offsets[last] > rows or (exact and offsets[last] != rows):
        _fail(f"{name}[{last}]: expected {'' if exact else 'at most '}{rows}, the number of rows, got {offsets[last]}")


def check_longest(name: str, offsets: list[int], bound: int, bound_name: str) -> None:
    longest = max((b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)), default=0)
    if longest > bound:
        _fail(f"{bound_name}: expected at least {longest}, the longest piece of {name}, got {bound}")


def check_pairs(cu_q: list[int], cu_k: list[int]) -> None:
    for b in range(len(cu_q) - 1):
        queries, keys = cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]
        if keys < queries:
            _fail(f"cu_k: expected at least {queries} keys in sequence {b}, as many as it has queries, got {keys}")


def check_boundaries(cu_q: list[int], cu_chunk: list[int]) -> None:
    inside = set(cu_chunk)
    for b, row in enumerate(cu_q):
        if row not in inside:
            _fail(f"cu_chunk: expected a boundary at cu_q[{b}] = {row}, where a sequence ends, got none")


def check_slot_values(mem_slot: Tensor, mem_len: Tensor, tokens: int) -> None:
    """Slots within the arena, lengths of the listed ones within 0..tokens."""
    slots = mem_len.shape[0]
    lengths = None
    for c, row in enumerate(mem_slot.tolist()):
        for r, slot in enumerate(row):
            if slot < -1 or slot >= slots:
                _fail(f"mem_slot[{c}, {r}]: expected -1 or a slot below {slots}, got {slot}")
            if slot < 0:
                continue
            lengths = mem_len.tolist() if lengths is None else lengths
            if not 0 <= lengths[slot] <= tokens:
                _fail(f"mem_len[{slot}]: expected 0..{tokens}, got {lengths[slot]}")


def check_head_map(head_map: Tensor | None, mem_heads: int) -> None:
    for h, head in enumerate([] if head_map is None else head_map.tolist()):
        if head < -1 or head >= mem_heads:
            _fail(f"head_map[{h}]: expected -1 or a record head below {mem_heads}, got {head}")


def check_cache_values(
    kv_len: list[int], cu_q: list[int], capacity: int, block_table: list[list[int]] | None, page: int, pages: int
) -> None:
    """kv_len is 0 or holds the new tokens and fits; the pages it covers exist."""
    for b, length in enumerate(kv_len):
        new = cu_q[b + 1] - cu_q[b]
        if length != 0 and not new <= length <= capacity:
            _fail(f"kv_len[{b}]: expected 0, or {new} (new tokens) to {capacity} (capacity of the cache), got {length}")
        if block_table is not None:
            for i in range((length + page - 1) // page):
                if not 0 <= block_table[b][i] < pages:
                    _fail(f"block_table[{b}, {i}]: expected a page below {pages}, got {block_table[b][i]}")
