"""What the tile schedules of the attention kernels read and write, in bytes, whatever compiles them: from the arguments
of a call and the sizes of its tiles. Packed rows ("vectors") are the query heads of a KV head, query row by query row.
"""

from __future__ import annotations

from torch import Tensor


def pairs(cu: Tensor) -> list[tuple[int, int]]:
    values = cu.tolist()
    return list(zip(values[:-1], values[1:], strict=True))


def _sizes(args) -> tuple[int, int, int]:
    """(all query vectors, KV heads, bytes of a row)."""
    q, k, *_ = args
    return q.shape[0] * q.shape[1], k.shape[1], q.shape[2] * q.element_size()


def _memory_tokens(slots, mem_len: Tensor) -> int:
    return sum(mem_len[s].item() for s in slots if s >= 0)


def keys_read(args, block: int) -> int:
    """Keys and values, of records and context, that blocks of `block` query vectors of a chunk read."""
    q, k, _, cu_q, cu_k, cu_chunk, _, _, mem_slot, mem_len, *_ = args
    (_, kv_heads, row), group, tokens = _sizes(args), q.shape[1] // k.shape[1], 0
    for c, (first, end) in enumerate(pairs(cu_chunk)):
        b = next(b for b, (_, last) in enumerate(pairs(cu_q)) if last > first)
        before = (cu_k[b + 1] - cu_k[b] - (cu_q[b + 1] - first)).item()  # keys before the chunk's first row
        memory, vectors = _memory_tokens(mem_slot[c].tolist(), mem_len), (end - first) * group
        last_rows = (min(at + block, vectors) - 1 for at in range(0, vectors, block))
        tokens += sum(memory + before + v // group + 1 for v in last_rows)
    return tokens * kv_heads * 2 * row


def vectors_seen(args, block: int) -> int:
    """Query vectors that blocks of `block` keys of the context read: those that see any of them."""
    q, _, _, cu_q, cu_k, *_ = args
    seen = 0
    for (a, b), (c, d) in zip(pairs(cu_q), pairs(cu_k), strict=True):
        hidden = [max(0, at - ((d - c) - (b - a))) for at in range(0, d - c, block)]
        seen += sum(b - a - h for h in hidden)
    return seen * q.shape[1]


def forward(args, block: int) -> int:
    """memory_attention: keys by blocks of vectors; q, out, lse and mass once."""
    vectors, _, row = _sizes(args)
    return keys_read(args, block) + vectors * (2 * row + 4 * (1 + args[8].shape[1]))


def backward(args, vectors_block: int, keys_block: int) -> int:
    """memory_attention_backward as csrc/memory_attention_backward has it: three kernels."""
    (vectors, kv_heads, row), (q, k, *_), mem_k, mem_slot, mem_len = _sizes(args), args, args[6], args[8], args[9]
    # grad_q: q, grad_out, out, lse, grad_lse; the correction and grad_q.
    total = keys_read(args, vectors_block) + vectors * (4 * row + 12)
    # Context: keys and values and their gradients once; q, grad_out, lse and correction for each block of keys.
    total += 4 * k.shape[0] * kv_heads * row + vectors_seen(args, keys_block) * (2 * row + 8)
    # Records: the same for each block of a chunk's tokens; shares in float32, written and read; the gradients.
    blocks = -(-mem_slot.shape[1] * mem_k.shape[2] // keys_block)
    total += blocks * vectors * (2 * row + 8)
    listed = mem_slot.flatten().tolist()
    shares, owned = (_memory_tokens(slots, mem_len) * kv_heads for slots in (listed, set(listed)))
    return total + shares * 2 * (row + 2 * 4 * q.shape[2]) + owned * 2 * row
