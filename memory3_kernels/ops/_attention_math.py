"""The reference arithmetic of the attention ops: one softmax over visible context and memory tokens.

Plain PyTorch, vectorised over heads, rows and chunks; sequences are a Python loop. Shapes in comments: T query rows,
C chunks of at most L rows, N = R * K memory tokens per chunk, H = Hkv, G query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Records(NamedTuple):
    """The memory tokens each chunk reads; unread rows are zeros, whatever the arena holds there."""

    k: Tensor  # [C, H, N, D]
    v: Tensor  # [C, H, N, D]
    bias: Tensor | None  # [C, H, N]
    visible: Tensor  # bool [C, H, N]
    slot: Tensor  # int64 [C, R], -1 replaced by 0
    head: Tensor  # int64 [H], -1 replaced by 0
    tokens: int  # K


def gather_records(
    mem_k: Tensor,
    mem_v: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None,
    head_map: Tensor | None,
    kv_heads: int,
    dtype: torch.dtype,
) -> Records:
    slots, mem_heads, tokens, dim = mem_k.shape
    chunks, refs = mem_slot.shape
    slot = mem_slot.clamp_min(0).long()
    if head_map is None:
        head_map = torch.arange(kv_heads, device=mem_k.device)
    head = head_map.clamp_min(0).long()
    size = (chunks, kv_heads, refs * tokens)
    if slots == 0 or mem_heads == 0 or refs * tokens == 0:
        zeros = mem_k.new_zeros(*size, dim, dtype=dtype)
        return Records(zeros, zeros, None, torch.zeros(size, dtype=torch.bool, device=mem_k.device), slot, head, tokens)
    length = mem_len[slot].where(mem_slot >= 0, 0)  # [C, R]
    visible = torch.arange(tokens, device=mem_k.device) < length.unsqueeze(-1)  # [C, R, K]
    visible = visible.unsqueeze(1) & (head_map >= 0).view(1, -1, 1, 1)  # [C, H, R, K]
    where = (slot.unsqueeze(1), head.view(1, -1, 1))

    def take(source: Tensor) -> Tensor:
        mask = visible if source.dim() == 3 else visible.unsqueeze(-1)
        return source[where].where(mask, 0).to(dtype).reshape(*size, *source.shape[3:])

    bias = None if mem_bias is None else take(mem_bias)
    return Records(take(mem_k), take(mem_v), bias, visible.reshape(size), slot, head, tokens)


class Chunks:
    """Moves rows [T, Hq, X] to per-chunk blocks [C, H, G * L, X] and back; short chunks are padded."""

    def __init__(self, cu_chunk: Sequence[int], kv_heads: int, device: torch.device):
        lengths = [b - a for a, b in zip(cu_chunk[:-1], cu_chunk[1:], strict=True)]
        self.longest, self.kv_heads, count = max(lengths, default=0), kv_heads, len(lengths)
        start = torch.tensor(cu_chunk[:-1], dtype=torch.long, device=device)
        length = torch.tensor(lengths, dtype=torch.long, device=device)
        self.chunk = torch.repeat_interleave(torch.arange(count, device=device), length)
        self.place = torch.arange(cu_chunk[-1], device=device) - start[self.chunk]
        place = torch.arange(self.longest, device=device)
        self.inside = place < length.unsqueeze(1)  # [C, L]
        self.row = (start.unsqueeze(1) + place).where(self.inside, 0)

    def split(self, rows: Tensor) -> Tensor:
        count, longest = self.row.shape
        if rows.shape[0] == 0:
            blocks = rows.new_zeros(count, longest, *rows.shape[1:])
        else:
            blocks = rows[self.row].where(self.inside[..., None, None], 0)
        group, width = rows.shape[1] // self.kv_heads, rows.shape[2]
        blocks = blocks.reshape(count, longest, self.kv_heads, group, width).permute(0, 2, 3, 1, 4)
        return blocks.reshape(count, self.kv_heads, group * longest, width)

    def join(self, blocks: Tensor, group: int) -> Tensor:
        count, heads, _, width = blocks.shape
        rows = blocks.reshape(count, heads, group, self.longest, width).permute(0, 3, 1, 2, 4)
        return rows[self.chunk, self.place].reshape(self.chunk.shape[0], heads * group, width)


def memory_scores(q: Tensor, records: Records, chunks: Chunks, scale: float) -> Tensor:
    """[T, Hq, N], -inf where a row reads nothing. `q` in the wide dtype."""
    scores = scale * (chunks.split(q) @ records.k.mT)  # [C, H, G * L, N]
    if records.bias is not None:
        scores = scores + records.bias.unsqueeze(2)
    scores = scores.where(records.visible.unsqueeze(2), -torch.inf)
    return chunks.join(scores, q.shape[1] // chunks.kv_heads)


def by_head(rows: Tensor, kv_heads: int) -> Tensor:
    """[S, Hq, X] -> [H, G * S, X]."""
    count, heads, width = rows.shape
    blocks = rows.reshape(count, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)
    return blocks.reshape(kv_heads, heads // kv_heads * count, width)


def by_row(blocks: Tensor, rows: int) -> Tensor:
    """[H, G * S, X] -> [S, Hq, X]."""
    heads, height, width = blocks.shape
    group = height // rows
    return blocks.reshape(heads, group, rows, width).permute(2, 0, 1, 3).reshape(rows, heads * group, width)


def context_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [Sq, Hq, D], k [Sk, H, D] -> [Sq, Hq, Sk], bottom-right causal."""
    queries, keys = q.shape[0], k.shape[0]
    scores = by_row(scale * (by_head(q, k.shape[1]) @ k.permute(1, 2, 0)), queries)
    last = torch.arange(queries, device=q.device).unsqueeze(1) + (keys - queries)
    return scores.masked_fill((torch.arange(keys, device=q.device) > last).unsqueeze(1), -torch.inf)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp over the last axis; 0 and -inf where every score is -inf."""
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    safe = scores.where(seen, 0)
    if safe.shape[-1] == 0:
        return safe, safe.new_full(safe.shape[:-1], -torch.inf)
    return torch.softmax(safe, -1).where(seen, 0), torch.logsumexp(safe, -1).where(seen.squeeze(-1), -torch.inf)


def attend(
    q: Tensor,
    cu_q: Sequence[int],
    context: Callable[[int], tuple[Tensor, Tensor]] | None,
    records: Records,
    cu_chunk: Sequence[int],
    refs: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, mass). `context(b)` gives the visible k, v [Sk, H, D] of sequence b in any dtype."""
    wide = records.k.dtype
    x = q.to(wide)
    kv_heads = records.k.shape[1]
    group = q.shape[1] // kv_heads
    chunks = Chunks(cu_chunk, kv_heads, q.device)
    scores = memory_scores(x, records, chunks, scale)
    if context is None:
        p_memory, lse = softmax(scores)
        from_context = None
    else:
        weights, sums, outputs = [scores[:0]], [x.new_zeros(0, q.shape[1])], [x[:0]]
        for b in range(len(cu_q) - 1):
            rows = slice(cu_q[b], cu_q[b + 1])
            if rows.start == rows.stop:
                continue
            k, v = (t.to(wide) for t in context(b))
            p, total = softmax(torch.cat([context_scores(x[rows], k, scale), scores[rows]], -1))
            p_context, p_memory = p.split([k.shape[0], scores.shape[2]], -1)
            outputs.append(by_row(by_head(p_context, kv_heads) @ v.transpose(0, 1), p.shape[0]))
            weights.append(p_memory)
            sums.append(total)
        p_memory, lse, from_context = torch.cat(weights), torch.cat(sums), torch.cat(outputs)
    out = chunks.join(chunks.split(p_memory) @ records.v, group)
    out = out if from_context is None else out + from_context
    mass = p_memory.detach().unflatten(2, (refs, records.tokens)).sum(-1)
    return out.to(q.dtype).contiguous(), lse, mass
