"""What the attention kernels share: one running softmax per row, fed with tiles of record tokens and of context.

Rows are (query, head of the group) pairs of one KV head. Scores, maxima and log-sum-exps are in units of log 2, as
exp2 is what the hardware has. [M] rows of a tile, [L] record tokens, [N] context tokens, [DP] head dim to a power of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _codec

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finite(x):
    """x, and 0 where it is -inf: what maxima are subtracted as where nothing has been seen."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def fold(acc, top, total, s, v, PRECISION: tl.constexpr):
    """Adds scores s [M, N] with values v [N, DP] to the running sums; returns them and exp2(s - top)."""
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - finite(new)[:, None])
    shrink = tl.exp2(top - finite(new))
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total * shrink + tl.sum(p, 1), p


@triton.jit
def record_lanes(
    mem_slot, mem_len, chunk, first, start, head, refs, slots, slot_chunk, slot_ref,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Record tokens as lanes: KP per record from record `first`, tokens from `start` of each. Returns slot (int64),
    token and whether there is one: a slot or head out of range is absent, a length is clamped."""
    lane = tl.arange(0, LANES)
    record = first + lane // KP
    token = start + lane % KP
    slot = tl.load(mem_slot + chunk * slot_chunk + record * slot_ref, mask=record < refs, other=-1)
    known = (slot >= 0) & (slot < slots) & (head >= 0)
    length = tl.load(mem_len + slot, mask=known, other=0)
    return slot.to(tl.int64), token, known & (token < tl.minimum(length, K))


@triton.jit
def read_records(
    q, acc, top, total, mass, place, rows_in,
    mem_k, mem_v, mem_bias, mem_slot, mem_len, chunk, head, refs, slots, scale,
    k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
    k_coarse, k_fine, v_coarse, v_fine,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CODED: tl.constexpr, VALUE: tl.constexpr,
    K_B: tl.constexpr, K_N: tl.constexpr, K_M: tl.constexpr, K_MP: tl.constexpr, K_W: tl.constexpr,
    K_WP: tl.constexpr, K_BYTES: tl.constexpr, V_B: tl.constexpr, V_N: tl.constexpr, V_M: tl.constexpr,
    V_MP: tl.constexpr, V_W: tl.constexpr, V_WP: tl.constexpr, V_BYTES: tl.constexpr,
):  # fmt: skip
    """Reads the records of a chunk for q [M, DP]; writes each record's log-sum-exp to mass[place, record], for
    `finish_mass`. Coded: q and acc have the columns of `_codec.read_pieces`, of the keys' and the values' book, and
    values are rounded to VALUE, as weights are."""
    RECORDS: tl.constexpr = LANES // KP
    d = tl.arange(0, DP)
    for first in tl.range(0, refs, RECORDS, num_stages=STAGES):
        of_record = tl.full((q.shape[0], RECORDS), float("-inf"), tl.float32)
        for start in tl.range(0, K, KP, num_stages=STAGES):
            slot, token, there = record_lanes(
                mem_slot, mem_len, chunk, first, start, head, refs, slots, slot_chunk, slot_ref, K, KP, LANES
            )
            at_k = slot * k_slot + head * k_head + token * k_token
            at_v = slot * v_slot + head * v_head + token * v_token
            if CODED:
                # Values first: keys, done with after one product, then hold registers for the shorter time.
                c0, c1 = _codec.read_coarse(mem_v, at_v, there, V_B)
                v = _codec.read_pieces(
                    mem_v, at_v, there, c0, c1, 0, v_coarse, v_fine, D, V_B, V_N, V_M, V_W, V_WP, V_MP, V_BYTES
                ).to(VALUE)
                c0, c1 = _codec.read_coarse(mem_k, at_k, there, K_B)
                k = _codec.read_pieces(
                    mem_k, at_k, there, c0, c1, 0, k_coarse, k_fine, D, K_B, K_N, K_M, K_W, K_WP, K_MP, K_BYTES
                )
            else:
                inside = there[:, None] & (d < D)[None, :]
                k = tl.load(mem_k + at_k[:, None] + d[None, :], mask=inside, other=0.0)
                v = tl.load(mem_v + at_v[:, None] + d[None, :], mask=inside, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if BIAS:
                bias = tl.load(mem_bias + slot * b_slot + head * b_head + token, mask=there, other=0.0)
                s += bias[None, :] * LOG2E
            s = tl.where(there[None, :], s, float("-inf"))
            acc, top, total, p = fold(acc, top, total, s, v, PRECISION)
            # Summed before the next tile shrinks them: log2 sum_t exp2(s_t) of each record in the tile.
            part = finite(top)[:, None] + tl.log2(tl.sum(tl.reshape(p, (q.shape[0], RECORDS, KP)), 2))
            if KP < K:  # a record is longer than the tile
                higher = tl.maximum(of_record, part)
                of_record = finite(higher) + tl.log2(
                    tl.exp2(of_record - finite(higher)) + tl.exp2(part - finite(higher))
                )
            else:
                of_record = part
        record = first + tl.arange(0, RECORDS)[None, :]
        tl.store(mass + place[:, None] * refs + record, of_record, mask=rows_in[:, None] & (record < refs))
    return acc, top, total


@triton.jit
def finish_mass(mass, place, rows_in, refs, lse, RECORDS: tl.constexpr):
    """From log-sum-exps of records to probabilities, in place; lse [M] over everything seen."""
    for first in range(0, refs, RECORDS):
        record = first + tl.arange(0, RECORDS)[None, :]
        inside = rows_in[:, None] & (record < refs)
        at = mass + place[:, None] * refs + record
        part = tl.load(at, mask=inside, other=float("-inf"))
        tl.store(at, tl.exp2(part - finite(lse)[:, None]), mask=inside)


@triton.jit
def finish(acc, top, total):
    """(out, lse in log 2): the normalised sums; 0 and -inf where nothing was seen."""
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, finite(top) + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
