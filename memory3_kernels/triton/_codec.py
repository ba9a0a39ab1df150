"""Reading the two-stage code inside a kernel (format: ops/_codec.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import _codec as codec
from ._launch import power_of_two


@triton.jit
def load_operand(place, inside):
    """The numbers at `place` [R, C], 0 where not `inside`, as an operand of a product.

    Three axes, as the compiler has two ways through shared memory: one for operands loaded with two, whose swizzle lets
    two to four lanes meet in a bank where numbers have four bytes, and one for any two layouts, without conflicts.
    """
    x = tl.load(tl.expand_dims(place, 0), mask=tl.expand_dims(inside, 0), other=0.0)
    return tl.reshape(x, place.shape)


@triton.jit
def read_coarse(codes, start, within, B: tl.constexpr):
    """The two coarse indices of the codes at bytes `start` [V]: at most 28 bits, in the first 4 bytes."""
    byte = tl.arange(0, 4)[None, :]
    inside = within[:, None] & (byte < (2 * B + 7) // 8)
    word = tl.sum(tl.load(codes + start[:, None] + byte, mask=inside, other=0).to(tl.int32) << (8 * byte), 1)
    return word & ((1 << B) - 1), (word >> B) & ((1 << B) - 1)


@triton.jit
def read_fine(codes, start, within, m, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr):
    """The indices of pieces m [P] of the codes at bytes `start` [V], 0 where there is none: [V, P]. At most 14 bits lie
    in 3 bytes; codes have no alignment."""
    bit = 8 * ((2 * B + 7) // 8) + m * N
    byte = (bit // 8)[None, :]
    at, inside = codes + start[:, None] + byte, within[:, None] & (m < M)[None, :]
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    word |= tl.load(at + 1, mask=inside & (byte + 1 < BYTES), other=0).to(tl.int32) << 8
    word |= tl.load(at + 2, mask=inside & (byte + 2 < BYTES), other=0).to(tl.int32) << 16
    # The largest of one: reductions end the compiler's search for the narrowest load that an operand of a product comes
    # from. It would find these bytes, and lay out the other operand for bytes as well, with two lanes in one bank.
    return tl.max(((word >> (bit % 8)[None, :]) & ((1 << N) - 1))[:, :, None], 2)


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
    index = read_fine(codes, start, within, m, B, N, M, BYTES)
    w = tl.arange(0, WP)
    d = (m * W)[:, None] + w[None, :]  # [P, WP]
    inside = within[:, None, None] & ((m < M)[:, None] & (w < W)[None, :])[None, :, :]
    # Entries are halves of a vector; d has passed one already where it lies in the second.
    lower, upper = first * (D // 2), (second + (1 << B) - 1) * (D // 2)
    entry = tl.where((d < D // 2)[None, :, :], lower[:, None, None], upper[:, None, None]) + d[None, :, :]
    x = tl.load(coarse + entry, mask=inside, other=0.0)
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
