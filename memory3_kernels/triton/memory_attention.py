"""memory_attention: one program per tile of a chunk's packed (query, head) rows of one KV head.

It reads the records of its chunk, then the context up to the diagonal, in one running softmax: whole tiles without
masks first, then the tiles that the diagonal or the end crosses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.memory_attention import check_values
from . import _heuristics, _launch
from ._attend import LN2, LOG2E, finish, finish_mass, fold, read_records
from ._launch import Launch
from ._prefill import arguments, chunk_rows, load_rows, record_head, visible_keys


@triton.jit
def read_context(
    q, acc, top, total, k, v, k_row, v_row, begin, end, last, scale,
    D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys begin..end of a sequence whose first are at k, v; row m sees those up to last [m]."""
    d = tl.arange(0, q.shape[1])
    for first in range(begin, end, N):
        n = first + tl.arange(0, N)
        at = n.to(tl.int64)
        key = load_rows(k + at * k_row, d, n < end, D, MASKED)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        if MASKED:
            s = tl.where((n < end)[None, :] & (n[None, :] <= last[:, None]), s, float("-inf"))
        value = load_rows(v + at * v_row, d, n < end, D, MASKED)
        acc, top, total, p = fold(acc, top, total, s, value, PRECISION)
    return acc, top, total


@triton.jit
def attention_kernel(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, out, lse, mass,
    kv_heads, blocks, chunks, sequences, refs, slots, mem_heads, scale,
    q_row, q_head, kc_row, kc_head, vc_row, vc_head,
    k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CONTEXT: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
    PRECISION: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    q_row, q_head = q_row * VECTOR, q_head * VECTOR
    kc_row, kc_head, vc_row, vc_head = kc_row * VECTOR, kc_head * VECTOR, vc_row * VECTOR, vc_head * VECTOR
    k_slot, k_head, k_token = k_slot * VECTOR, k_head * VECTOR, k_token * VECTOR
    v_slot, v_head, v_token = v_slot * VECTOR, v_head * VECTOR, v_token * VECTOR
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % kv_heads
    # Chunks at the end of a sequence see the most: they start first.
    c = chunks - 1 - (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    start = tl.load(cu_chunk + c)
    queries = tl.load(cu_chunk + c + 1) - start
    if block * M >= queries * G:
        return
    row = block * M + tl.arange(0, M)
    query, rows_in = chunk_rows(cu_chunk, c, row, G)
    place = query * (kv_heads * G) + h * G + row % G
    d = tl.arange(0, DP)
    offset = query * q_row + (h * G + row % G) * q_head
    x = load_rows(q + offset, d, rows_in, D, True)

    acc = tl.zeros((M, DP), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc, top, total = read_records(
        x, acc, top, total, mass, place, rows_in, mem_k, mem_v, mem_bias, mem_slot, mem_len, c,
        record_head(head_map, h, mem_heads, MAPPED), refs, slots, scale,
        k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
        q, q, q, q, K, KP, LANES, D, DP, BIAS, PRECISION, STAGES,
        False, None, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0,
    )  # fmt: skip
    if CONTEXT:
        first_key, before = visible_keys(cu_q, cu_k, start, sequences)
        last = before + row // G
        whole = tl.maximum(before + block * M // G + 1, 0) // N * N  # seen by every row of the tile
        end = before + tl.minimum(queries - 1, (block * M + M - 1) // G) + 1
        k += first_key * kc_row + h * kc_head
        v += first_key * vc_row + h * vc_head
        acc, top, total = read_context(
            x, acc, top, total, k, v, kc_row, vc_row, 0, whole, last, scale, D, N, PRECISION, False
        )
        acc, top, total = read_context(
            x, acc, top, total, k, v, kc_row, vc_row, whole, end, last, scale, D, N, PRECISION, True
        )

    result, sum2 = finish(acc, top, total)
    # Places are computed again from a second load: kept, they would take registers through all the loops.
    query, rows_in = chunk_rows(cu_chunk, c, row, G)
    place = query * (kv_heads * G) + h * G + row % G
    tl.store(out + place[:, None] * D + d[None, :], result.to(out.dtype.element_ty),
             mask=rows_in[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(lse + place, sum2 * LN2, mask=rows_in)
    tl.debug_barrier()
    finish_mass(mass, place, rows_in, refs, sum2, LANES // KP)


def launch(outputs, q, k, v, cu_q, cu_k, cu_chunk, *records, scale: float, max_chunk: int) -> Launch:
    args, constants = arguments(q, k, v, cu_q, cu_k, cu_chunk, *records)
    out, lse, mass = outputs
    packed, dim, size = constants["G"] * max(max_chunk, 1), q.shape[2], q.element_size()
    tile = _heuristics.prefill_tile(packed, dim, size)
    # 64 lanes of records beside 64 tokens of context are two registers too many for three blocks per multiprocessor of
    # sm_86, and ptxas would spill them.
    record = _heuristics.record_tile(mass.shape[2], constants["K"], dim, size, most=min(tile.tokens, 32))
    blocks = triton.cdiv(packed, tile.rows)
    args |= {"out": out, "lse": lse, "mass": mass, "blocks": blocks, "scale": scale}
    constants |= {"M": tile.rows, "N": tile.tokens, "KP": record.padded, "LANES": record.lanes}
    constants |= {"STAGES": tile.stages}
    grid = (args["chunks"] * args["kv_heads"] * blocks,)
    return Launch(attention_kernel, grid, args, constants, tile.warps, tile.stages, fresh=("out", "lse", "mass"))


def call(
    q: Tensor, k: Tensor | None, v: Tensor | None, cu_q: Tensor, cu_k: Tensor, cu_chunk: Tensor, mem_k: Tensor,
    mem_v: Tensor, mem_slot: Tensor, mem_len: Tensor, mem_bias: Tensor | None = None, head_map: Tensor | None = None,
    *, scale: float, max_q: int, max_k: int, max_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    args = (q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)
    sizes = {"scale": scale, "max_q": max_q, "max_k": max_k, "max_chunk": max_chunk}
    outputs = _launch.outputs("memory_attention", *args, **sizes)
    if _launch.checks_values():
        check_values(q, k, cu_q, cu_k, cu_chunk, mem_k, mem_slot, mem_len, head_map, max_q, max_k, max_chunk)
    if q.shape[0] and cu_chunk.shape[0] > 1:
        _launch.run([launch(outputs, *args, scale=scale, max_chunk=max_chunk)])
    return outputs
