"""The kernel of vq_dequantize and gather_dequantize: codes to vectors, with the rotation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _codec
from ._launch import Launch, power_of_two


@triton.jit
def dequantize_kernel(
    codes, slots, coarse, fine, rot, out, vectors, heads, tokens, capacity, c_slot, c_head, r_row, r_column,
    D: tl.constexpr, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, BYTES: tl.constexpr, GATHER: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = vector < vectors
    record, head, token = vector // tokens // heads, vector // tokens % heads, vector % tokens
    if GATHER:
        slot = tl.load(slots + record, mask=within, other=-1)
        known = within & (slot >= 0) & (slot < capacity)
        start = slot.to(tl.int64) * c_slot + head * c_head + token * BYTES
    else:
        known = within
        start = record * c_slot + head * c_head + token * BYTES
    first, second = _codec.read_coarse(codes, start, known, B)
    if ROTATE:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        x = tl.zeros((ROWS, COLUMNS), tl.float32)
        for piece in tl.range(0, M, PIECES, num_stages=1):
            y = _codec.read_pieces(
                codes, start, known, first, second, piece, coarse, fine, D, B, N, M, W, WP, PIECES, BYTES
            )
            d, real = _codec.columns(piece, W, WP, PIECES, M)
            at = rot + d[:, None] * r_row + column[None, :] * r_column
            turn = _codec.load_operand(at, real[:, None] & (column < D)[None, :])
            x = tl.dot(y, turn, x, input_precision=PRECISION)
        place = out + vector[:, None] * D + column[None, :]
        tl.store(place, x.to(out.dtype.element_ty), mask=within[:, None] & (column < D)[None, :])
    else:
        piece = tl.program_id(1) * PIECES
        y = _codec.read_pieces(
            codes, start, known, first, second, piece, coarse, fine, D, B, N, M, W, WP, PIECES, BYTES
        )
        d, real = _codec.columns(piece, W, WP, PIECES, M)
        place = out + vector[:, None] * D + d[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=within[:, None] & real[None, :])


def launch(codes: Tensor, slots: Tensor | None, coarse: Tensor, fine: Tensor, rot: Tensor | None, out: Tensor,
           vectors: int, heads: int, tokens: int, capacity: int, strides: tuple[int, int]) -> Launch:  # fmt: skip
    """Vector i is token i % tokens of head i // tokens % heads of record i // tokens // heads; `strides` in bytes from
    record to record and from head to head. `slots` None: records in order."""
    dim, rotated = 2 * coarse.shape[2], rot is not None
    code = _codec.constants(coarse, fine)
    width = power_of_two(dim, 16)
    # Rotation: 32 x 128 products, 32 deep, are 32 accumulators and as many operands per thread of 4 warps; half the
    # rows for exact products, which keep more of them. Without one a program writes 2048 values, 16 per thread.
    exact = out.dtype is torch.float32
    deep = max(16, min(32, code["MP"] * code["WP"]))
    pieces = max(1, (deep if rotated else min(128, width)) // code["WP"])
    rows = (16 if exact else 32) if rotated else max(1, 2048 // (pieces * code["WP"]))
    columns = min(width, 128)
    args = {"codes": codes, "slots": codes if slots is None else slots, "coarse": coarse.contiguous()}
    args |= {"fine": fine.contiguous(), "rot": rot if rotated else coarse, "out": out}
    args |= {"vectors": vectors, "heads": heads, "tokens": tokens, "capacity": capacity}
    args |= {"c_slot": strides[0], "c_head": strides[1]}
    args |= {"r_row": rot.stride(0) if rotated else 0, "r_column": rot.stride(1) if rotated else 0}
    constants = code | {"D": dim, "GATHER": slots is not None, "ROTATE": rotated}
    constants |= {"ROWS": rows, "COLUMNS": columns, "PIECES": pieces}
    # Results of half precision take tf32 products in three parts, as good as float32; one part would cost fp16 a bit.
    constants |= {"PRECISION": "ieee" if exact else "tf32x3"}
    grid = (triton.cdiv(vectors, rows), triton.cdiv(dim, columns) if rotated else triton.cdiv(code["M"], pieces))
    return Launch(dequantize_kernel, grid, args, constants, num_warps=4, num_stages=2, fresh=("out",))
