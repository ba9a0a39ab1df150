"""The kernels of memory_decode and memory_decode_coded: split-KV flash decoding.

One program per (sequence, KV head, block of packed rows) and split. With one split it reads the records, then the
context, and is done; with several the records are one more split, and merge_splits_kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..book import Book
from . import _codec, _heuristics
from ._attend import LN2, LOG2E, finish, finish_mass, finite, fold, read_records
from ._launch import Launch, divide, power_of_two, vector


@triton.jit
def rotate(source, offset, rows_in, rot, column, real, r_in: tl.constexpr, r_out: tl.constexpr, D: tl.constexpr,
           DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The rows of source at `offset` [M] times rot, whose strides are r_in along the sum and r_out: the columns
    `column` [C] of the result that are `real`, float32 [M, C]."""
    turned = tl.zeros((offset.shape[0], column.shape[0]), tl.float32)
    for deep in range(0, D, DEPTH):
        j = deep + tl.arange(0, DEPTH)
        x = tl.load(source + offset[:, None] + j[None, :], mask=rows_in[:, None] & (j < D)[None, :], other=0.0)
        inside = (j < D)[:, None] & real[None, :]
        side = tl.load(rot + j[:, None] * r_in + column[None, :] * r_out, mask=inside, other=0.0)
        turned = tl.dot(x.to(tl.float32), side, turned, input_precision=PRECISION)
    return turned


@triton.jit
def decode_kernel(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
    k_coarse, k_fine, k_rot, v_coarse, v_fine, v_rot, out, lse, mass, part_out, part_lse,
    kv_heads, blocks, splits, pairs, capacity, pages, refs, slots, mem_heads, scale,
    q_row, q_head, kc_page, kc_row, kc_head, vc_page, vc_row, vc_head, t_seq, t_page,
    k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr, CODED: tl.constexpr, ROTATE_K: tl.constexpr, ROTATE_V: tl.constexpr,
    K_B: tl.constexpr, K_N: tl.constexpr, K_M: tl.constexpr, K_MP: tl.constexpr, K_W: tl.constexpr,
    K_WP: tl.constexpr, K_BYTES: tl.constexpr, V_B: tl.constexpr, V_N: tl.constexpr, V_M: tl.constexpr,
    V_MP: tl.constexpr, V_W: tl.constexpr, V_WP: tl.constexpr, V_BYTES: tl.constexpr,
    DEPTH: tl.constexpr, MEM_PRECISION: tl.constexpr, ROT_PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    q_row, q_head = q_row * VECTOR, q_head * VECTOR
    kc_page, kc_row, kc_head = kc_page * VECTOR, kc_row * VECTOR, kc_head * VECTOR
    vc_page, vc_row, vc_head = vc_page * VECTOR, vc_row * VECTOR, vc_head * VECTOR
    if not CODED:
        k_slot, k_head, k_token = k_slot * VECTOR, k_head * VECTOR, k_token * VECTOR
        v_slot, v_head, v_token = v_slot * VECTOR, v_head * VECTOR, v_token * VECTOR
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % kv_heads
    b = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    start = tl.load(cu_q + b)
    queries = tl.load(cu_q + b + 1) - start
    if block * M >= queries * G:
        return
    row = block * M + tl.arange(0, M)
    rows_in = row < queries * G
    query = (start + row // G).to(tl.int64)
    offset = query * q_row + (h * G + row % G) * q_head
    place = query * (kv_heads * G) + h * G + row % G  # in lse; times D in out
    d = tl.arange(0, DP)
    x = tl.load(q + offset[:, None] + d[None, :], mask=rows_in[:, None] & (d < D)[None, :], other=0.0)

    acc = tl.zeros((M, DP), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    if FUSED or split == splits:
        head = h
        if MAPPED:
            head = tl.load(head_map + h)
        head = tl.where(head < mem_heads, head, -1)
        if CODED:
            # Keys and values are left in the basis they were coded in: the query goes there, the output comes back.
            column, real = _codec.columns(0, K_W, K_WP, K_MP, K_M)
            if ROTATE_K:
                asking = rotate(q, offset, rows_in, k_rot, column, real, 1, D, D, DEPTH, ROT_PRECISION)
            else:
                asked = rows_in[:, None] & real[None, :]
                asking = _codec.load_operand(q + offset[:, None] + column[None, :], asked).to(tl.float32)
            reading = tl.zeros((M, V_MP * V_WP), tl.float32)
        else:
            asking, reading = x, acc
        reading, top, total = read_records(
            asking, reading, top, total, mass, place, rows_in, mem_k, mem_v, mem_bias, mem_slot, mem_len, b, head, refs,
            slots, scale, k_slot, k_head, k_token, v_slot, v_head, v_token, b_slot, b_head, slot_chunk, slot_ref,
            k_coarse, k_fine, v_coarse, v_fine, K, KP, LANES, D, DP, BIAS, MEM_PRECISION, STAGES, CODED,
            q.dtype.element_ty, K_B, K_N, K_M, K_MP, K_W, K_WP, K_BYTES, V_B, V_N, V_M, V_MP, V_W, V_WP, V_BYTES,
        )  # fmt: skip
        if CODED:  # through memory, as a tile in registers can neither be cut along a sum nor drop columns
            column, real = _codec.columns(0, V_W, V_WP, V_MP, V_M)
            at = (place if FUSED else place + (place * 0 + splits) * pairs) * D
            stored = rows_in[:, None] & real[None, :]
            tl.store(part_out + at[:, None] + column[None, :], reading, mask=stored)
            tl.debug_barrier()
            if ROTATE_V:
                acc = rotate(part_out, at, rows_in, v_rot, d, d < D, D, 1, D, DEPTH, ROT_PRECISION)
            else:
                whole = rows_in[:, None] & (d < D)[None, :]
                acc = tl.load(part_out + at[:, None] + d[None, :], mask=whole, other=0.0)
            tl.debug_barrier()  # before a split overwrites it with its result
        else:
            acc = reading
    if FUSED or split < splits:
        length = tl.minimum(tl.load(kv_len + b), capacity)
        last = length - queries + row // G
        each = tl.cdiv(tl.cdiv(length, N), splits) * N
        end = tl.minimum(length, (split + 1) * each)
        for first in range(split * each, end, N):
            n = first + tl.arange(0, N)
            there = n < end
            if PAGE > 0:
                page = tl.load(block_table + b * t_seq + (n // PAGE).to(tl.int64) * t_page, mask=there, other=-1)
                there = there & (page >= 0) & (page < pages)
                at_k = page.to(tl.int64) * kc_page + (n % PAGE).to(tl.int64) * kc_row
                at_v = page.to(tl.int64) * vc_page + (n % PAGE).to(tl.int64) * vc_row
            else:
                at_k = b * kc_page + n.to(tl.int64) * kc_row
                at_v = b * vc_page + n.to(tl.int64) * vc_row
            inside = there[:, None] & (d < D)[None, :]
            k = tl.load(k_cache + (at_k + h * kc_head)[:, None] + d[None, :], mask=inside, other=0.0)
            s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(there[None, :] & (n[None, :] <= last[:, None]), s, float("-inf"))
            v = tl.load(v_cache + (at_v + h * vc_head)[:, None] + d[None, :], mask=inside, other=0.0)
            acc, top, total, p = fold(acc, top, total, s, v, PRECISION)

    result, sum2 = finish(acc, top, total)
    inside = rows_in[:, None] & (d < D)[None, :]
    if FUSED:
        tl.store(out + place[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + place, sum2 * LN2, mask=rows_in)
        tl.debug_barrier()
        finish_mass(mass, place, rows_in, refs, sum2, LANES // KP)
    else:
        place += split.to(tl.int64) * pairs
        tl.store(part_out + place[:, None] * D + d[None, :], result, mask=inside)
        tl.store(part_lse + place, sum2, mask=rows_in)


@triton.jit
def merge_splits_kernel(
    part_out, part_lse, out, lse, mass, parts, pairs, refs,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    """Joins the parts of BLOCK (row, head) pairs; mass holds log-sum-exps and becomes probabilities."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows_in = pair < pairs
    part = tl.arange(0, PARTS)
    sums = tl.load(
        part_lse + part[None, :] * pairs + pair[:, None],
        mask=rows_in[:, None] & (part < parts)[None, :],
        other=float("-inf"),
    )
    top = finite(tl.max(sums, 1))
    total = tl.sum(tl.exp2(sums - top[:, None]), 1)
    sum2 = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    d = tl.arange(0, DP)
    inside = rows_in[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK, DP), tl.float32)
    for i in range(0, parts):
        at = pair + (pair * 0 + i) * pairs
        weight = tl.exp2(tl.load(part_lse + at, mask=rows_in, other=float("-inf")) - finite(sum2))
        acc += weight[:, None] * tl.load(part_out + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out + pair[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + pair, sum2 * LN2, mask=rows_in)
    finish_mass(mass, pair, rows_in, refs, sum2, RECORDS)


RECORD_STRIDES = ("k_slot", "k_head", "k_token", "v_slot", "v_head", "v_token")
NO_CODE = {"B": 0, "N": 0, "M": 1, "MP": 1, "W": 1, "WP": 1, "BYTES": 0}


def code_arguments(q: Tensor, k_book: Book | None, v_book: Book | None) -> tuple[dict, dict]:
    """(arguments, constants) of the kernel for coded records; stand-ins for dense ones."""
    args, constants = {}, {"CODED": k_book is not None}
    for side, book in (("k", k_book), ("v", v_book)):
        if book is None:
            args |= {f"{side}_coarse": q, f"{side}_fine": q, f"{side}_rot": q}
            found = NO_CODE
        else:
            args |= {f"{side}_coarse": book.coarse.contiguous(), f"{side}_fine": book.fine.contiguous()}
            args[f"{side}_rot"] = q if book.rot is None else book.rot.contiguous()
            found = _codec.constants(book.coarse, book.fine)
        constants |= {f"{side.upper()}_{name}": found[name] for name in NO_CODE}
        constants[f"ROTATE_{side.upper()}"] = book is not None and book.rot is not None
    return args, constants


def record_arguments(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, token_strides) -> dict:
    """Arguments of `read_records` that are the same everywhere; absent tensors stand in for themselves by mem_len."""
    args = {"mem_k": mem_k, "mem_v": mem_v, "mem_slot": mem_slot, "mem_len": mem_len.contiguous()}
    args |= {"mem_bias": mem_len if mem_bias is None else mem_bias}
    args |= {"head_map": mem_len if head_map is None else head_map.contiguous()}
    args |= {"refs": mem_slot.shape[1], "slots": mem_k.shape[0], "mem_heads": mem_k.shape[1]}
    args |= {"k_slot": mem_k.stride(0), "k_head": mem_k.stride(1), "k_token": token_strides[0]}
    args |= {"v_slot": mem_v.stride(0), "v_head": mem_v.stride(1), "v_token": token_strides[1]}
    args |= {"b_slot": 0 if mem_bias is None else mem_bias.stride(0)}
    args |= {"b_head": 0 if mem_bias is None else mem_bias.stride(1)}
    return args | {"slot_chunk": mem_slot.stride(0), "slot_ref": mem_slot.stride(1)}


def launches(
    outputs: tuple[Tensor, Tensor, Tensor], q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_len: Tensor,
    block_table: Tensor | None, cu_q: Tensor, mem_k: Tensor, mem_v: Tensor, mem_slot: Tensor, mem_len: Tensor,
    mem_bias: Tensor | None, head_map: Tensor | None, k_book: Book | None, v_book: Book | None, *, tokens: int,
    scale: float, max_q: int, max_kv: int,
) -> list[Launch]:  # fmt: skip
    """The launches of one call, with their workspace. Records are dense without books, codes with them."""
    out, lse, mass = outputs
    rows, heads, dim = q.shape
    sequences, kv_heads, refs = cu_q.shape[0] - 1, k_cache.shape[2], mem_slot.shape[1]
    if rows == 0 or sequences == 0:
        return []
    group, size, width = heads // kv_heads, q.element_size(), power_of_two(dim, 16)
    tile = _heuristics.decode_tile(sequences, kv_heads, group, max_q, max_kv, dim, size)
    record = _heuristics.record_tile(refs, tokens, dim, size, coded=k_book is not None)
    parts = 1 if tile.splits == 1 else tile.splits + 1
    needs_scratch = parts > 1 or k_book is not None
    part_out = q.new_empty((parts, rows, heads, dim) if needs_scratch else 0, dtype=torch.float32)
    part_lse = q.new_empty((parts, rows, heads) if parts > 1 else 0, dtype=torch.float32)

    pairs = rows * heads
    blocks = triton.cdiv(group * max(max_q, 1), tile.rows)
    page = 0 if block_table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    table = kv_len if block_table is None else block_table
    code_args, code_constants = code_arguments(q, k_book, v_book)
    if k_book is None:
        token_strides = (mem_k.stride(2), mem_v.stride(2))
    else:
        token_strides = (code_constants["K_BYTES"], code_constants["V_BYTES"])
    args = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "kv_len": kv_len.contiguous(), "block_table": table}
    args |= {"cu_q": cu_q.contiguous(), "out": out, "lse": lse, "mass": mass, "part_out": part_out}
    args |= {"part_lse": part_lse, "kv_heads": kv_heads, "blocks": blocks, "splits": tile.splits, "pairs": pairs}
    args |= {"capacity": capacity, "pages": k_cache.shape[0], "scale": scale, "q_row": q.stride(0)}
    args |= {"q_head": q.stride(1)}
    args |= dict(zip(("kc_page", "kc_row", "kc_head"), k_cache.stride()[:3], strict=True))
    args |= dict(zip(("vc_page", "vc_row", "vc_head"), v_cache.stride()[:3], strict=True))
    args |= {"t_seq": table.stride(0) if page else 0, "t_page": table.stride(1) if page else 0}
    args |= record_arguments(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, token_strides) | code_args
    exact = "ieee" if q.dtype is torch.float32 else "tf32"
    constants = {"G": group, "D": dim, "DP": width, "M": tile.rows, "N": tile.tokens, "PAGE": page}
    constants |= {"K": tokens, "KP": record.padded, "LANES": record.lanes, "BIAS": mem_bias is not None}
    constants |= {"MAPPED": head_map is not None, "FUSED": parts == 1, "PRECISION": exact, "MEM_PRECISION": exact}
    # Rotations come in tiles of a depth that no tile of queries or keys has: where shapes are the same, Triton loads
    # float32 as it loads those, eight elements per thread, and two lanes of a copy meet in one bank.
    depth = 16 if size == 4 else next(n for n in (32, 64, 16) if n not in (tile.rows, tile.tokens))
    constants |= {"ROT_PRECISION": "ieee" if exact == "ieee" else "tf32x3", "DEPTH": depth} | code_constants
    dense = () if k_book is not None else (mem_k, mem_v)
    constants["VECTOR"] = vector(q, k_cache, v_cache, *dense)
    divide(args, constants["VECTOR"], "q_", "kc_", "vc_", *(() if k_book is not None else RECORD_STRIDES))
    # Gathers from codebooks are not worth a pipeline: addresses of one element each fill the registers.
    constants["STAGES"] = tile.stages if k_book is None else 1
    fresh = ("out", "lse", "mass", "part_out", "part_lse")
    grid = (sequences * kv_heads * blocks, parts)
    found = [Launch(decode_kernel, grid, args, constants, tile.warps, tile.stages, fresh)]
    if parts > 1:
        # 4 floats of the output per thread: with 8, ptxas spills two registers on sm_100 to stay at 32, a full SM's.
        block = max(1, 512 // width)
        args = {"part_out": part_out, "part_lse": part_lse, "out": out, "lse": lse, "mass": mass, "parts": parts}
        args |= {"pairs": pairs, "refs": refs}
        constants = {"D": dim, "DP": width, "BLOCK": block, "PARTS": power_of_two(parts), "RECORDS": 8}
        found.append(Launch(merge_splits_kernel, (triton.cdiv(pairs, block),), args, constants, fresh=fresh))
    return found
