"""Reading the two-stage code inside a kernel (format: ops/_codec.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import _codec as codec
from ._launch import power_of_two


@triton.jit
def read_bits(codes, start, bit, within, BITS: tl.constexpr, BYTES: tl.constexpr):
    """BITS bits from bit `bit` of the code of BYTES bytes that begins at byte `start`, lowest first. At most 14 bits
    lie in 3 bytes; codes have no alignment."""
    byte = bit // 8
    word = tl.load(codes + start + byte, mask=within, other=0).to(tl.int32)
    word |= tl.load(codes + start + byte + 1, mask=within & (byte + 1 < BYTES), other=0).to(tl.int32) << 8
    word |= tl.load(codes + start + byte + 2, mask=within & (byte + 2 < BYTES), other=0).to(tl.int32) << 16
    return (word >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def read_indices(codes, start, within, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                 BYTES: tl.constexpr):  # fmt: skip
    """The indices of the codes at bytes `start` [V]: coarse [V] and [V], fine [V, MP]. Each is unpacked once."""
    first = read_bits(codes, start, 0 * start.to(tl.int32), within, B, BYTES)
    second = read_bits(codes, start, 0 * start.to(tl.int32) + B, within, B, BYTES)
    piece = tl.arange(0, MP)[None, :]
    bit = 8 * ((2 * B + 7) // 8) + piece * N
    fine = read_bits(codes, start[:, None], bit, within[:, None] & (piece < M), N, BYTES)
    return first, second, fine


@triton.jit
def read_columns(first, second, fine, within, coarse, fine_table, column, D: tl.constexpr, B: tl.constexpr,
                 N: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Columns `column` [C] of the vectors with these indices, before rotation: float32 [V, C], 0 outside."""
    inside = within[:, None] & (column < D)[None, :]
    upper = (column >= D // 2)[None, :]
    entry = tl.where(upper, second[:, None] + (1 << B), first[:, None])
    place = tl.where(column >= D // 2, column - D // 2, column)[None, :]
    x = tl.load(coarse + entry * (D // 2) + place, mask=inside, other=0.0).to(tl.float32)
    piece = tl.minimum(column // (D // M), M - 1)[None, :]
    index = tl.gather(fine, tl.broadcast_to(piece, inside.shape), 1) + (piece << N)
    return x + tl.load(fine_table + index * (D // M) + (column % (D // M))[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


def constants(coarse: Tensor, fine: Tensor) -> dict[str, int]:
    """The format as constants of a kernel."""
    return {
        "D": 2 * coarse.shape[2],
        "B": codec.index_bits(coarse),
        "N": codec.index_bits(fine),
        "M": fine.shape[0],
        "MP": power_of_two(fine.shape[0], 2),
        "BYTES": codec.code_bytes(coarse, fine),
    }
