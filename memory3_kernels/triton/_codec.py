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
def read_coarse(codes, start, within, B: tl.constexpr, BYTES: tl.constexpr):
    """The two coarse indices of the codes at bytes `start` [V]."""
    zero = start.to(tl.int32) * 0
    return read_bits(codes, start, zero, within, B, BYTES), read_bits(codes, start, zero + B, within, B, BYTES)


@triton.jit
def columns(piece, W: tl.constexpr, WP: tl.constexpr, P: tl.constexpr, M: tl.constexpr):
    """Where the columns of `read_pieces` lie in a vector, and which of them do: [P * WP] each, from piece `piece`."""
    column = tl.arange(0, P * WP)
    at, place = piece + column // WP, column % WP
    return at * W + place, (at < M) & (place < W)


@triton.jit
def read_pieces(
    codes, start, within, first, second, piece, coarse, fine,
    D: tl.constexpr, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    P: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """P pieces from `piece` on of the vectors coded at bytes `start` [V], before rotation: float32 [V, P * WP].

    Each piece of W values is padded to WP, so that one index, unpacked once, serves neighbouring lanes.
    """
    m = piece + tl.arange(0, P)
    bit = 8 * ((2 * B + 7) // 8) + m * N
    index = read_bits(codes, start[:, None], bit[None, :], within[:, None] & (m < M)[None, :], N, BYTES)
    w = tl.arange(0, WP)
    d = (m * W)[:, None] + w[None, :]  # [P, WP]
    inside = within[:, None, None] & ((m < M)[:, None] & (w < W)[None, :])[None, :, :]
    upper = d >= D // 2
    entry = tl.where(upper[None, :, :], second[:, None, None] + (1 << B), first[:, None, None]) * (D // 2)
    x = tl.load(coarse + entry + tl.where(upper, d - D // 2, d)[None, :, :], mask=inside, other=0.0)
    row = (index + (m << N)[None, :]) * W
    y = tl.load(fine + row[:, :, None] + w[None, None, :], mask=inside, other=0.0)
    return tl.reshape(x.to(tl.float32) + y.to(tl.float32), (start.shape[0], P * WP))


def constants(coarse: Tensor, fine: Tensor) -> dict[str, int]:
    """The format as constants of a kernel: bits, pieces, values per piece (W, padded WP) and pieces padded (MP)."""
    width = power_of_two(fine.shape[2])
    return {
        "B": codec.index_bits(coarse),
        "N": codec.index_bits(fine),
        "M": fine.shape[0],
        "MP": power_of_two(fine.shape[0], max(1, 16 // width)),
        "W": fine.shape[2],
        "WP": width,
        "BYTES": codec.code_bytes(coarse, fine),
    }
