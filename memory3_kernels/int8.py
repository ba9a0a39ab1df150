"""Weights of linear maps in int8, one scale per row, laid out for `int8_linear` (csrc/include/m3/int8_linear.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._load import simd_level
from .packed import TILE, padded_rows

COLS = 64  # columns are padded to a multiple of this with zeros
MOST_COLS = 65536  # sums of more products could leave int32


class Int8Weight(NamedTuple):
    """A weight [rows, cols] and a bias for `int8_linear`; made by `quantise_weight`.

    Attributes:
        data: uint8 [ceil(rows / 16), bytes of a tile], contiguous.
        rows, cols: of the weight.
    """

    data: Tensor
    rows: int
    cols: int


def int8_pays() -> bool:
    """Whether `int8_linear` is faster than `packed_linear` on this machine: with AVX-512 (docs/ops/int8_linear.md)."""
    return simd_level() in ("avx512", "avx512bf16", "amx")


def tile_bytes(cols: int) -> int:
    """Bytes of a tile: values, and a scale, a sum and a bias for each of its 16 rows."""
    return TILE * (-(-cols // COLS) * COLS + 12)


def quantise_weight(weight: Tensor, bias: Tensor | None = None) -> Int8Weight:
    """A dense weight [rows, cols] of any floating dtype in int8: q = round(w / d), d the row's largest value over 127.

    Args:
        weight: [rows, cols], at most 65,536 columns.
        bias: [rows]; None: zeros.

    Raises:
        RuntimeError: not a matrix, too many columns, or a bias of another length.
    """
    torch._check(weight.dim() == 2, lambda: f"weight: expected [rows, cols], got {list(weight.shape)}")
    rows, cols = weight.shape
    torch._check(cols <= MOST_COLS, lambda: f"weight: expected at most {MOST_COLS} columns, got {cols}")
    torch._check(
        bias is None or tuple(bias.shape) == (rows,), lambda: f"bias: expected [{rows}], got {list(bias.shape)}"
    )
    weight = weight.detach().to("cpu", torch.float32)
    scale = weight.abs().amax(1) / 127 if cols else weight.new_zeros(rows)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    values = (weight * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    total = values.sum(1, dtype=torch.int32)
    offset = weight.new_zeros(rows) if bias is None else bias.detach().to("cpu", torch.float32)
    wide = padded_rows(torch.nn.functional.pad(values, (0, -cols % COLS)))
    tiles = wide.shape[0] // TILE
    quads = wide.view(tiles, TILE, wide.shape[1] // 4, 4).transpose(1, 2).contiguous()
    quads = quads.view(tiles, TILE * wide.shape[1]).view(torch.uint8)
    about = [padded_rows(part).view(tiles, TILE).view(torch.uint8) for part in (scale, total, offset)]
    return Int8Weight(torch.cat((quads, *about), 1).contiguous(), rows, cols)


def dequantise_weight(
    data: Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(integers [rows, cols], scales [rows], bias [rows]) of an int8 weight, in `dtype`."""
    tiles, wide = data.shape[0], -(-cols // COLS) * COLS
    quads = data[:, : TILE * wide].contiguous().view(torch.int8).view(tiles, wide // 4, TILE, 4)
    values = quads.transpose(1, 2).reshape(tiles * TILE, wide)[:rows, :cols]
    about = data[:, TILE * wide :].contiguous().view(torch.float32).view(tiles, 3, TILE)
    scale, bias = (about[:, i].reshape(-1)[:rows] for i in (0, 2))
    return values.to(dtype), scale.to(dtype), bias.to(dtype)
