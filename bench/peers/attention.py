"""Attention in plain torch on operands laid out beforehand for it: what the attention ops are compared with.

Each function takes its op's arguments and returns a Peer. What a user of torch could have prepared once (records copied
beside the context, a mask) is prepared here, outside the timed call.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .peer import Peer


def plain_records(name: str, mem_bias: Tensor | None, head_map: Tensor | None) -> None:
    """Raises ValueError for what the peers do not do."""
    if mem_bias is not None or head_map is not None:
        raise ValueError(f"{name}: expected records without mem_bias and head_map, which torch has no argument for")


def record_rows(records: Tensor, mem_slot: Tensor, mem_len: Tensor, chunk: int) -> Tensor:
    """[Hkv, tokens, D]: the valid tokens of a chunk's records, one after the other."""
    slots = [slot for slot in mem_slot[chunk].tolist() if slot >= 0]
    none = records.new_empty((records.shape[1], 0, records.shape[3]))
    return torch.cat([none, *(records[slot, :, : int(mem_len[slot])] for slot in slots)], dim=1)


def sdpa_concatenated(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
) -> Peer:  # fmt: skip
    """memory_decode's peer: SDPA with grouped heads over keys and values [B, Hkv, memory + context, D], contiguous.

    Raises:
        ValueError: sequences differ in length or bring more than one new token (torch would need a mask), or the cache
            is paged.
    """
    plain_records("sdpa_concatenated", mem_bias, head_map)
    if block_table is not None or max_q != 1 or q.shape[0] != kv_len.shape[0] or len(set(kv_len.tolist())) != 1:
        raise ValueError("sdpa_concatenated: expected a dense cache, one new token each and equal kv_len")
    sides = []
    for cache, records in ((k_cache, mem_k), (v_cache, mem_v)):
        rows = [
            torch.cat([record_rows(records, mem_slot, mem_len, b), cache[b, : int(kv_len[b])].transpose(0, 1)], dim=1)
            for b in range(q.shape[0])
        ]
        sides.append(torch.stack(rows))
    query, (keys, values) = q.unsqueeze(2), sides
    return Peer(
        lambda: sdpa(query, keys, values, scale=scale, enable_gqa=True),
        lambda out: out.squeeze(2),
        (query, keys, values),
    )


def one_causal_sequence(name: str, cu_q: Tensor, cu_k: Tensor, k: Tensor | None) -> None:
    """Raises ValueError for what the peers of memory_attention do not do."""
    if k is None or cu_q.tolist() != cu_k.tolist() or len(cu_q) != 2:
        raise ValueError(f"{name}: expected one sequence with as many keys as queries, got cu_q {cu_q}, cu_k {cu_k}")


def sdpa_explicit_mask(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
) -> Peer:  # fmt: skip
    """memory_attention's peer: all chunks' records beside the context and an additive mask that hides the others'.

    An additive mask in q's dtype: torch turns a boolean one into it at every call.

    Raises:
        ValueError: more than one sequence, or keys that are not the queries' own.
    """
    plain_records("sdpa_explicit_mask", mem_bias, head_map)
    one_causal_sequence("sdpa_explicit_mask", cu_q, cu_k, k)
    rows, bounds = q.shape[0], cu_chunk.tolist()
    sides = []
    for context, records in ((k, mem_k), (v, mem_v)):
        pieces = [record_rows(records, mem_slot, mem_len, c) for c in range(len(bounds) - 1)]
        sides.append(torch.cat([*pieces, context.transpose(0, 1)], dim=1).unsqueeze(0))
    visible = torch.zeros(rows, sides[0].shape[2], dtype=torch.bool)
    at = 0
    for c, piece in enumerate(pieces):
        visible[bounds[c] : bounds[c + 1], at : at + piece.shape[1]] = True
        at += piece.shape[1]
    visible[:, at:] = torch.ones(rows, rows, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    query = q.transpose(0, 1).unsqueeze(0).contiguous()
    keys, values = sides
    return Peer(
        lambda: sdpa(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True),
        lambda out: out[0].transpose(0, 1),
        (query, keys, values, mask),
    )


def two_partial_attentions(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
) -> Peer:  # fmt: skip
    """memory_attention's other peer: causal attention over the context, attention of each chunk over its records (one
    batch of chunks), both with the log-sum-exp of torch's flash kernel, merged in torch.

    Raises:
        ValueError: more than one sequence, keys that are not the queries' own, or chunks or records of several lengths.
    """
    plain_records("two_partial_attentions", mem_bias, head_map)
    one_causal_sequence("two_partial_attentions", cu_q, cu_k, k)
    chunks = len(cu_chunk) - 1
    pieces = [record_rows(mem_k, mem_slot, mem_len, c) for c in range(chunks)]
    if len(set(cu_chunk.diff().tolist())) != 1 or len({piece.shape[1] for piece in pieces}) != 1:
        raise ValueError("two_partial_attentions: expected chunks of one length, each with as many memory tokens")
    group = q.shape[1] // k.shape[1]
    query = q.transpose(0, 1).unsqueeze(0).contiguous()
    # This kernel has no grouped heads: keys and values are repeated beforehand.
    keys, values = (x.transpose(0, 1).repeat_interleave(group, 0).unsqueeze(0).contiguous() for x in (k, v))
    mem_keys = torch.stack(pieces).repeat_interleave(group, 1)
    mem_values = torch.stack([record_rows(mem_v, mem_slot, mem_len, c) for c in range(chunks)])
    mem_values = mem_values.repeat_interleave(group, 1)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, heads, dim = q.shape
    by_chunk = query.reshape(heads, chunks, rows // chunks, dim).transpose(0, 1).contiguous()

    def call() -> Tensor:
        context, lse = flash(query, keys, values, is_causal=True, scale=scale)
        memory, memory_lse = flash(by_chunk, mem_keys, mem_values, scale=scale)
        memory = memory.transpose(0, 1).reshape(1, heads, rows, dim)
        memory_lse = memory_lse.transpose(0, 1).reshape(lse.shape)
        share = torch.sigmoid(lse - memory_lse).unsqueeze(-1)  # exp lse / (exp lse + exp memory_lse)
        return torch.lerp(memory.float(), context.float(), share).to(q.dtype)

    return Peer(call, lambda out: out[0].transpose(0, 1), (query, keys, values, by_chunk, mem_keys, mem_values))


def compiled_flex_attention(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
) -> Peer:  # fmt: skip
    """memory_attention's third peer: torch's FlexAttention, compiled, on the keys of sdpa_explicit_mask; its block mask
    leaves out whole blocks that no query of a block sees.

    Raises:
        ValueError: more than one sequence, or keys that are not the queries' own.
        RuntimeError: not asked for (M3_BENCH_FLEX=1): compiling takes a minute per shape.
    """
    if os.environ.get("M3_BENCH_FLEX") != "1":
        raise RuntimeError("compiled_flex_attention: compiling takes a minute per shape; set M3_BENCH_FLEX=1 to run it")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    plain_records("compiled_flex_attention", mem_bias, head_map)
    one_causal_sequence("compiled_flex_attention", cu_q, cu_k, k)
    rows, bounds = q.shape[0], cu_chunk.tolist()
    sides, owners = [], []
    for context, records in ((k, mem_k), (v, mem_v)):
        pieces = [record_rows(records, mem_slot, mem_len, c) for c in range(len(bounds) - 1)]
        sides.append(torch.cat([*pieces, context.transpose(0, 1)], dim=1).unsqueeze(0))
        owners = [c for c, piece in enumerate(pieces) for _ in range(piece.shape[1])]
    first = len(owners)
    owner = torch.tensor([*owners, *[-1] * rows])
    chunk = torch.bucketize(torch.arange(rows), torch.tensor(bounds[1:]), right=True)

    def visible(batch, head, at, key):
        return torch.where(key < first, owner[key] == chunk[at], key - first <= at)

    mask = create_block_mask(visible, None, None, rows, first + rows, device="cpu")
    query = q.transpose(0, 1).unsqueeze(0).contiguous()
    keys, values = sides
    compiled = torch.compile(flex_attention)
    return Peer(
        lambda: compiled(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True),
        lambda out: out[0].transpose(0, 1),
        (query, keys, values),
    )
