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
    D: tl.constexpr, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BYTES: tl.constexpr,
    GATHER: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = vector < vectors
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    record, head, token = vector // tokens // heads, vector // tokens % heads, vector % tokens
    if GATHER:
        slot = tl.load(slots + record, mask=within, other=-1)
        known = within & (slot >= 0) & (slot < capacity)
        start = slot.to(tl.int64) * c_slot + head * c_head + token * BYTES
    else:
        known = within
        start = record * c_slot + head * c_head + token * BYTES
    first, second, pieces = _codec.read_indices(codes, start, known, B, N, M, MP, BYTES)
    if ROTATE:
        x = tl.zeros((ROWS, COLUMNS), tl.float32)
        for deep in range(0, D, DEPTH):
            d = deep + tl.arange(0, DEPTH)
            y = _codec.read_columns(first, second, pieces, known, coarse, fine, d, D, B, N, M)
            turn = tl.load(
                rot + d[:, None] * r_row + column[None, :] * r_column,
                mask=(d < D)[:, None] & (column < D)[None, :],
                other=0.0,
            )
            x = tl.dot(y, turn, x, input_precision=PRECISION)
    else:
        x = _codec.read_columns(first, second, pieces, known, coarse, fine, column, D, B, N, M)
    place = out + vector[:, None] * D + column[None, :]
    tl.store(place, x.to(out.dtype.element_ty), mask=within[:, None] & (column < D)[None, :])


def launch(codes: Tensor, slots: Tensor | None, coarse: Tensor, fine: Tensor, rot: Tensor | None, out: Tensor,
           vectors: int, heads: int, tokens: int, capacity: int, strides: tuple[int, int]) -> Launch:  # fmt: skip
    """Vector i is token i % tokens of head i // tokens % heads of record i // tokens // heads; `strides` in bytes from
    record to record and from head to head. `slots` None: records in order."""
    dim = 2 * coarse.shape[2]
    width = power_of_two(dim, 16)
    columns = min(width, 128) if rot is not None else width
    # Rotation: 32 x 128 products, 32 deep: 32 accumulators and as many operands in three parts per thread of 4 warps;
    # 64 rows spill on sm_80. Without a rotation a program writes 2048 values, 16 per thread.
    rows = 32 if rot is not None else max(1, 2048 // columns)
    args = {"codes": codes, "slots": codes if slots is None else slots, "coarse": coarse.contiguous()}
    args |= {"fine": fine.contiguous(), "rot": coarse if rot is None else rot, "out": out}
    args |= {"vectors": vectors, "heads": heads, "tokens": tokens, "capacity": capacity}
    args |= {"c_slot": strides[0], "c_head": strides[1]}
    args |= {"r_row": 0 if rot is None else rot.stride(0), "r_column": 0 if rot is None else rot.stride(1)}
    constants = _codec.constants(coarse, fine) | {"GATHER": slots is not None, "ROTATE": rot is not None}
    constants |= {"ROWS": rows, "COLUMNS": columns, "DEPTH": 32 if width > 16 else 16}
    # Results of half precision take tf32 products in three parts, as good as float32; one part would cost fp16 a bit.
    constants |= {"PRECISION": "ieee" if out.dtype is torch.float32 else "tf32x3"}
    grid = (triton.cdiv(vectors, rows), triton.cdiv(dim, columns))
    return Launch(dequantize_kernel, grid, args, constants, num_warps=4, num_stages=2, fresh=("out",))
