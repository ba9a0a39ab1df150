"""The kernels of memory_attention_backward. Each tile of a result has one program, which sums in one order: no atomics.

Probabilities come back from the log-sum-exps. With g the gradient of out and delta_i = grad_lse_i - g_i . out_i:
ds_ij = p_ij (g_i . v_j + delta_i). Rows that saw nothing (lse -inf) are read as g = 0, delta = 0, p = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attend import LOG2E, finite, record_lanes
from ._prefill import chunk_rows, load_rows, record_head, visible_keys


@triton.jit
def add_keys(
    dq, x, g, sum2, delta, key, value, bias, seen, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [M, DP] plus the share of keys and values [N, DP] that the rows see where `seen` [M, N] (or broadcast)."""
    s = tl.dot(x, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
    if BIAS:
        s += bias[None, :] * LOG2E
    p = tl.where(seen, tl.exp2(s - finite(sum2)[:, None]), 0.0)
    dp = tl.dot(g, tl.trans(value), input_precision=PRECISION)
    ds = p * (dp + delta[:, None])
    return tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)


@triton.jit
def add_context(
    dq, x, g, sum2, delta, k, v, k_row, v_row, begin, end, last, seeing, scale,
    D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`add_keys` for keys begin..end of a sequence whose first are at k, v; row m sees those up to last [m]."""
    d = tl.arange(0, x.shape[1])
    for first in range(begin, end, N):
        n = first + tl.arange(0, N)
        at = n.to(tl.int64)
        key = load_rows(k + at * k_row, d, n < end, D, MASKED)
        value = load_rows(v + at * v_row, d, n < end, D, MASKED)
        seen = seeing[:, None]
        if MASKED:
            seen = seen & (n < end)[None, :] & (n[None, :] <= last[:, None])
        dq = add_keys(dq, x, g, sum2, delta, key, value, 0, seen, scale, False, PRECISION)
    return dq


@triton.jit
def query_gradient_kernel(
    grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
    delta, dq, kv_heads, blocks, chunks, sequences, refs, slots, mem_heads, scale,
    q_row, q_head, kc_row, kc_head, vc_row, vc_head,
    k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CONTEXT: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
    PRECISION: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dq of a tile of a chunk's rows of one KV head, and delta for the kernels after it; cut as in the forward."""
    q_row, q_head = q_row * VECTOR, q_head * VECTOR
    kc_row, kc_head, vc_row, vc_head = kc_row * VECTOR, kc_head * VECTOR, vc_row * VECTOR, vc_head * VECTOR
    k_slot, k_head, k_token = k_slot * VECTOR, k_head * VECTOR, k_token * VECTOR
    v_slot, v_head, v_token = v_slot * VECTOR, v_head * VECTOR, v_token * VECTOR
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % kv_heads
    c = chunks - 1 - (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    start = tl.load(cu_chunk + c)
    queries = tl.load(cu_chunk + c + 1) - start
    if block * M >= queries * G:
        return
    row = block * M + tl.arange(0, M)
    query, rows_in = chunk_rows(cu_chunk, c, row, G)
    place = query * (kv_heads * G) + h * G + row % G
    d = tl.arange(0, DP)
    sum2 = tl.load(lse + place, mask=rows_in, other=float("-inf")) * LOG2E
    seeing = sum2 > float("-inf")
    x = load_rows(q + query * q_row + (h * G + row % G) * q_head, d, rows_in, D, True)
    g = load_rows(grad_out + place * D, d, seeing, D, True)
    result = load_rows(out + place * D, d, seeing, D, True)
    extra = tl.load(grad_lse + place, mask=seeing, other=0.0) - tl.sum(g.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + place, extra, mask=rows_in)

    acc = tl.zeros((M, DP), tl.float32)
    head = record_head(head_map, h, mem_heads, MAPPED)
    for first in range(0, refs, LANES // KP):
        for begin in range(0, K, KP):
            slot, token, there = record_lanes(
                mem_slot, mem_len, c, first, begin, head, refs, slots, slot_chunk, slot_ref, K, KP, LANES
            )
            key = load_rows(mem_k + slot * k_slot + head * k_head + token * k_token, d, there, D, True)
            value = load_rows(mem_v + slot * v_slot + head * v_head + token * v_token, d, there, D, True)
            bias = 0
            if BIAS:
                bias = tl.load(mem_bias + slot * b_slot + head * b_head + token, mask=there, other=0.0)
            seen = seeing[:, None] & there[None, :]
            acc = add_keys(acc, x, g, sum2, extra, key, value, bias, seen, scale, BIAS, PRECISION)
    if CONTEXT:
        first_key, before = visible_keys(cu_q, cu_k, start, sequences)
        last = before + row // G
        whole = tl.maximum(before + block * M // G + 1, 0) // N * N  # seen by every row of the tile
        end = before + tl.minimum(queries - 1, (block * M + M - 1) // G) + 1
        k += first_key * kc_row + h * kc_head
        v += first_key * vc_row + h * vc_head
        acc = add_context(
            acc, x, g, sum2, extra, k, v, kc_row, vc_row, 0, whole, last, seeing, scale, D, N, PRECISION, False
        )
        acc = add_context(
            acc, x, g, sum2, extra, k, v, kc_row, vc_row, whole, end, last, seeing, scale, D, N, PRECISION, True
        )
    query, rows_in = chunk_rows(cu_chunk, c, row, G)  # again, as in the forward
    place = query * (kv_heads * G) + h * G + row % G
    tl.store(dq + place[:, None] * D + d[None, :], (acc * scale).to(dq.dtype.element_ty),
             mask=rows_in[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def add_rows(
    dk, dv, db, key, value, bias, there, n, q, grad_out, lse, delta, first_query, begin, end, before, h, heads,
    q_row, q_head, scale,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv [N, DP] and db [N] plus the share of the packed rows begin..end from row `first_query` on, for keys
    `there` [N]. CAUSAL: packed row m sees keys n up to before + m // G."""
    d = tl.arange(0, key.shape[1])
    for first in range(begin, end, M):
        row = first + tl.arange(0, M)
        query = (first_query + row // G).to(tl.int64)
        head = h * G + row % G
        place = query * heads + head
        sum2 = tl.load(lse + place, mask=row < end, other=float("-inf")) * LOG2E
        seeing = sum2 > float("-inf")
        x = load_rows(q + query * q_row + head * q_head, d, row < end, D, True)
        g = load_rows(grad_out + place * D, d, seeing, D, True)
        extra = tl.load(delta + place, mask=row < end, other=0.0)
        s = tl.dot(key, tl.trans(x), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            s += bias[:, None] * LOG2E
        seen = there[:, None] & seeing[None, :]
        if CAUSAL:
            seen = seen & (n[:, None] <= (before + row // G)[None, :])
        p = tl.where(seen, tl.exp2(s - finite(sum2)[None, :]), 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(value, tl.trans(g), input_precision=PRECISION) + extra[None, :])
        dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)
        if BIAS:
            db += tl.sum(ds, 1)
    return dk, dv, db


@triton.jit
def context_gradient_kernel(
    grad_out, lse, delta, q, k, v, cu_q, cu_k, dk, dv, kv_heads, blocks, sequences, scale,
    q_row, q_head, kc_row, kc_head, vc_row, vc_head,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one sequence and KV head: a loop over the rows that see them."""
    q_row, q_head = q_row * VECTOR, q_head * VECTOR
    kc_row, kc_head, vc_row, vc_head = kc_row * VECTOR, kc_head * VECTOR, vc_row * VECTOR, vc_head * VECTOR
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % kv_heads
    b = tl.program_id(0) // blocks // kv_heads
    first_query, first_key = tl.load(cu_q + b), tl.load(cu_k + b).to(tl.int64)
    queries, keys = tl.load(cu_q + b + 1) - first_query, (tl.load(cu_k + b + 1) - first_key).to(tl.int32)
    if block * N >= keys:
        return
    n = block * N + tl.arange(0, N)
    at = first_key + n
    d = tl.arange(0, DP)
    key = load_rows(k + at * kc_row + h * kc_head, d, n < keys, D, True)
    value = load_rows(v + at * vc_row + h * vc_head, d, n < keys, D, True)
    zeros = tl.zeros((N, DP), tl.float32)
    begin = tl.maximum(block * N - (keys - queries), 0) * G // M * M
    sum_k, sum_v, sum_b = add_rows(
        zeros, zeros, 0, key, value, 0, n < keys, n, q, grad_out, lse, delta, first_query, begin, queries * G,
        keys - queries, h, kv_heads * G, q_row, q_head, scale, G, D, M, False, True, PRECISION,
    )  # fmt: skip
    place = (at * kv_heads + h)[:, None] * D + d[None, :]
    inside = (n < keys)[:, None] & (d < D)[None, :]
    tl.store(dk + place, (sum_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, sum_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def next_entry(mem_slot, entry, end, slot, refs, slot_chunk, slot_ref, SEARCH: tl.constexpr):
    """The first entry of mem_slot, counted row by row from `entry` on, that names `slot`; `end` if none before does."""
    found = end
    while (entry < end) & (found == end):
        at = entry + tl.arange(0, SEARCH)
        place = (at // refs).to(tl.int64) * slot_chunk + at % refs * slot_ref
        named = tl.load(mem_slot + place, mask=at < end, other=-1) == slot
        found = tl.min(tl.where(named, at, end), 0)
        entry += SEARCH
    return found


@triton.jit
def record_gradient_kernel(
    grad_out, lse, delta, q, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, dk, dv, db,
    kv_heads, blocks, entries, refs, slots, mem_heads, scale, q_row, q_head,
    k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, MAPPED: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of N tokens of one record and head. Of the entries of mem_slot that name a slot the first one
    owns it: its program goes through the chunks of all of them in ascending order."""
    q_row, q_head = q_row * VECTOR, q_head * VECTOR
    k_slot, k_head, k_token = k_slot * VECTOR, k_head * VECTOR, k_token * VECTOR
    v_slot, v_head, v_token = v_slot * VECTOR, v_head * VECTOR, v_token * VECTOR
    block = tl.program_id(0) % blocks
    record = tl.program_id(0) // blocks % mem_heads
    own = tl.program_id(0) // blocks // mem_heads
    slot = tl.load(mem_slot + (own // refs).to(tl.int64) * slot_chunk + own % refs * slot_ref)
    if (slot < 0) | (slot >= slots):
        return
    length = tl.minimum(tl.load(mem_len + slot), K)
    if block * N >= length:
        return
    nothing = own * 0  # of a type that a loop can change
    if next_entry(mem_slot, nothing, own, slot, refs, slot_chunk, slot_ref, SEARCH) < own:
        return
    n = block * N + tl.arange(0, N)
    there = n < length
    d = tl.arange(0, DP)
    wide = slot.to(tl.int64)
    key = load_rows(mem_k + wide * k_slot + record * k_head + n * k_token, d, there, D, True)
    value = load_rows(mem_v + wide * v_slot + record * v_head + n * v_token, d, there, D, True)
    bias = 0
    if BIAS:
        bias = tl.load(mem_bias + wide * b_slot + record * b_head + n, mask=there, other=0.0)
    sum_k = tl.zeros((N, DP), tl.float32)
    sum_v = tl.zeros((N, DP), tl.float32)
    sum_b = 0
    if BIAS:
        sum_b = tl.zeros((N,), tl.float32)
    low, high = record, record + 1
    if MAPPED:
        low, high = 0, kv_heads
    at = own
    while at < entries:
        start = tl.load(cu_chunk + at // refs)
        rows = (tl.load(cu_chunk + at // refs + 1) - start) * G
        for h in range(low, high):
            # Heads that read another record head have no rows here.
            end = tl.where(record_head(head_map, h, mem_heads, MAPPED) == record, rows, 0)
            sum_k, sum_v, sum_b = add_rows(
                sum_k, sum_v, sum_b, key, value, bias, there, n, q, grad_out, lse, delta, start, 0, end, 0, h,
                kv_heads * G, q_row, q_head, scale, G, D, M, BIAS, False, PRECISION,
            )  # fmt: skip
        at = next_entry(mem_slot, at + 1, entries, slot, refs, slot_chunk, slot_ref, SEARCH)
    token = (wide * mem_heads + record) * K + n
    inside = there[:, None] & (d < D)[None, :]
    tl.store(dk + token[:, None] * D + d[None, :], (sum_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + token[:, None] * D + d[None, :], sum_v.to(dv.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(db + token, sum_b, mask=there)
