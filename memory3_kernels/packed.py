"""Weights of linear layers, packed for inference: bf16, or GGUF's blocks of 32 values with their scales, reordered.

Layout (csrc/include/m3/packed_linear.h): tiles of 16 rows; a tile holds K / 32 blocks of 32 columns, then their scales.
The values of q8_0 and q4_1 are those of the GGUF file; nothing is quantised again. What such weights are multiplied by
is rounded to bf16, or to MXINT8 (OCP Microscaling v1.0): 32 columns share a power of two and have 8 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._load import simd_level

TILE, BLOCK = 16, 32
# Bytes of a GGUF block in a row, of a packed block's values per row, float16 scales per row and block.
FORMATS = {"bf16": (64, 64, 0), "q8_0": (34, 32, 1), "q4_1": (20, 16, 2)}
ACTIVATIONS = ("bf16", "mxint8")
LETTERS = {"bf16": "b", "q8_0": "8", "q4_1": "4"}


class PackedWeight(NamedTuple):
    """A weight [rows, cols] for `packed_linear`; made by `pack_weight`, `pack_blocks`.

    Attributes:
        data: uint8 [ceil(rows / 16), bytes of a tile], contiguous.
        rows, cols: of the weight; cols is a multiple of 32.
        format: "bf16", "q8_0" (8.5 bits per weight) or "q4_1" (5 bits).
        activations: to what its factor is rounded, "bf16" or, where the format is another, "mxint8".
    """

    data: Tensor
    rows: int
    cols: int
    format: str
    activations: str = "bf16"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class PackedWeights(NamedTuple):
    """Packed weights end to end, for an op that takes those of a whole model: two arguments to pass and to check at
    every call instead of hundreds. Made by `join_weights`.

    Attributes:
        data: uint8 [bytes], contiguous; every weight begins at a multiple of 64.
        formats: a letter of LETTERS per weight.
        activations: those of the weights that are not bf16.
    """

    data: Tensor
    formats: str
    activations: str = "bf16"


def mxint8_pays() -> bool:
    """Whether products of bytes are this machine's fastest (docs/ops/packed_linear.md): AVX-512 with VNNI, no AMX."""
    return simd_level() == "avx512bf16"


def join_weights(
    weights: Sequence[PackedWeight], data: Tensor | None = None
) -> tuple[PackedWeights, list[PackedWeight]]:
    """The weights end to end, and each of them as a view of that. `data`: where, uint8 [all their bytes]; None: new.

    Raises RuntimeError where weights that are not bf16 expect different activations.
    """
    kinds = sorted({weight.activations for weight in weights if weight.format != "bf16"})
    torch._check(len(kinds) <= 1, lambda: f"weights: expected one kind of activations, got {' and '.join(kinds)}")
    sizes = [weight.nbytes for weight in weights]
    if data is None:
        data = torch.empty(sum(sizes), dtype=torch.uint8)
    views = [
        weight._replace(data=part.view_as(weight.data).copy_(weight.data))
        for weight, part in zip(weights, data.split(sizes), strict=True)
    ]
    return PackedWeights(data, "".join(LETTERS[weight.format] for weight in weights), *kinds), views


def check_activations(activations: str) -> None:
    """Raises RuntimeError for a kind that is not in ACTIVATIONS."""
    torch._check(
        activations in ACTIVATIONS, lambda: f"activations: expected one of {', '.join(ACTIVATIONS)}, got {activations}"
    )


def round_activations(x: Tensor, activations: str) -> Tensor:
    """x [..., a multiple of 32], rounded to bf16 values: what kernels multiply, in x's dtype.

    mxint8: 32 columns are q 2^(e - 6), |q| <= 127, where 2^e is the largest power of two that is not above the largest
    of them in magnitude (OCP Microscaling v1.0; e >= -54 here). A block with a value that is not finite, or is 2^112 or
    more, becomes NaN.
    """
    if activations == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    blocks = x.unflatten(-1, (-1, BLOCK))
    top = blocks.abs().amax(-1, keepdim=True)
    exponent = (torch.frexp(top.double())[1] - 1).clamp_min(-54)
    scale = torch.ldexp(torch.ones_like(top, dtype=torch.float64), exponent - 6)
    values = (blocks.double() / scale).round().clamp(-127, 127) * scale
    return torch.where(top < 2.0**112, values, torch.nan).to(x.dtype).flatten(-2)


def check_format(format: str) -> None:
    """Raises RuntimeError for a format that is not in FORMATS."""
    torch._check(format in FORMATS, lambda: f"format: expected one of {', '.join(FORMATS)}, got {format}")


def tile_bytes(cols: int, format: str) -> int:
    """Bytes of a tile: blocks, scales, and padding to whole cache lines."""
    _, values, scales = FORMATS[format]
    return -(-(cols // BLOCK * TILE * (values + 2 * scales)) // 64) * 64


def pack_weight(weight: Tensor, format: str = "bf16", activations: str = "bf16") -> PackedWeight:
    """Packs a dense weight [rows, cols] of any floating dtype; q8_0 and q4_1 quantise it by GGUF's rules.

    activations: see PackedWeight; bf16 weights always meet bf16.

    Raises:
        RuntimeError: an unknown format or kind, not a matrix, or columns that are not a multiple of 32.
    """
    check_format(format)
    check_activations(activations)
    torch._check(weight.dim() == 2, lambda: f"weight: expected [rows, cols], got {list(weight.shape)}")
    rows, cols = weight.shape
    torch._check(cols % BLOCK == 0, lambda: f"weight: expected a multiple of {BLOCK} columns, got {cols}")
    weight = weight.detach()
    if format == "bf16":
        return _assemble(_pairs(weight.to(torch.bfloat16)), None, rows, cols, format)
    blocks = weight.to(torch.float32).reshape(rows, cols // BLOCK, BLOCK)
    if format == "q8_0":
        scale = blocks.abs().amax(-1) / 127
        inverse = torch.where(scale > 0, 1 / scale, 0)
        values = (blocks * inverse.unsqueeze(-1)).round().to(torch.int8).reshape(rows, cols)
        return _assemble(_pairs(values), scale.unsqueeze(-1), rows, cols, format, activations)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = (high - low) / 15
    inverse = torch.where(scale > 0, 1 / scale, 0)
    values = ((blocks - low.unsqueeze(-1)) * inverse.unsqueeze(-1) + 0.5).clamp(0, 15).to(torch.uint8)
    return _assemble(_words(values.reshape(rows, cols)), torch.stack((scale, low), -1), rows, cols, format, activations)


def pack_blocks(blocks: Tensor, format: str, activations: str = "bf16") -> PackedWeight:
    """Packs the rows of a GGUF tensor as they lie in the file: uint8 [rows, bytes], "q8_0", "q4_1" or "q4_0".

    q4_0, d (q - 8), becomes q4_1 with m = -8 d, which float16 holds exactly (|d| < 8192).
    activations: see PackedWeight.

    Raises:
        RuntimeError: another format, kind or dtype, or rows that are not whole blocks.
    """
    check_activations(activations)
    torch._check(format in ("q8_0", "q4_1", "q4_0"), lambda: f"format: expected q8_0, q4_1 or q4_0, got {format}")
    width, _, scales = (18, 16, 1) if format == "q4_0" else FORMATS[format]
    torch._check(
        blocks.dtype is torch.uint8 and blocks.dim() == 2 and blocks.shape[1] % width == 0,
        lambda: f"blocks: expected uint8 [rows, a multiple of {width}], got {blocks.dtype} {list(blocks.shape)}",
    )
    rows, count = blocks.shape[0], blocks.shape[1] // width
    parts = blocks.reshape(rows, count, width)
    scale = parts[..., : 2 * scales].contiguous().view(torch.float16)
    body = parts[..., 2 * scales :]
    if format == "q8_0":
        values = _pairs(body.contiguous().view(torch.int8).reshape(rows, count * BLOCK))
    else:  # byte j: column j in the low half, column j + 16 in the high half
        values = _words(torch.cat((body & 15, body >> 4), -1).reshape(rows, count * BLOCK))
    if format == "q4_0":
        scale, format = torch.cat((scale, -8 * scale), -1), "q4_1"
    return _assemble(values, scale, rows, count * BLOCK, format, activations)


def unpack_weight(data: Tensor, rows: int, cols: int, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [rows, cols] that a packed one stands for. Exact in float32 but for the rounding of d q + m."""
    _, per_row, scales = FORMATS[format]
    tiles, blocks = data.shape[0], cols // BLOCK
    body = data[:, : blocks * TILE * per_row].contiguous()
    if format == "q4_1":
        words = body.view(torch.int16).to(torch.int32).view(tiles, blocks, 4, TILE, 2) & 0xFFFF
        parts = torch.stack([words >> 4 * j & 15 for j in range(4)], -2)  # [tile, block, c, row, j, p]
        values = parts.permute(0, 3, 1, 2, 4, 5).reshape(tiles * TILE, cols)
    else:
        stored = body.view(torch.bfloat16 if format == "bf16" else torch.int8)
        values = stored.view(tiles, cols // 2, TILE, 2).permute(0, 2, 1, 3).reshape(tiles * TILE, cols)
    values = values[:rows].to(dtype)
    if not scales:
        return values
    at = blocks * TILE * per_row
    scale = data[:, at : at + blocks * TILE * 2 * scales].contiguous().view(torch.float16)
    scale = scale.view(tiles, blocks, scales, TILE).permute(2, 0, 3, 1).reshape(scales, tiles * TILE, blocks, 1)
    scale = scale[:, :rows].to(dtype)
    values = values.view(rows, blocks, BLOCK) * scale[0]
    return (values + scale[1] if scales == 2 else values).view(rows, cols)


def padded_rows(rows: Tensor) -> Tensor:
    """With rows of zeros behind, to a multiple of TILE."""
    missing = -rows.shape[0] % TILE
    return torch.cat((rows, rows.new_zeros((missing, *rows.shape[1:])))) if missing else rows


def _pairs(values: Tensor) -> Tensor:
    """[rows, cols] -> uint8 [tiles, bytes]: 16 rows side by side, two columns each."""
    values = padded_rows(values)
    rows, cols = values.shape
    pairs = values.view(rows // TILE, TILE, cols // 2, 2).transpose(1, 2).contiguous()
    return pairs.view(rows // TILE, TILE * cols).view(torch.uint8)


def _words(values: Tensor) -> Tensor:
    """uint8 [rows, cols] of 0..15 -> uint8 [tiles, bytes]: word [c, row, p] holds columns 8c + 2j + p in bits 4j."""
    values = padded_rows(values)
    rows, cols = values.shape
    parts = values.to(torch.int32).view(rows // TILE, TILE, cols // BLOCK, 4, 4, 2)  # [tile, row, block, c, j, p]
    words = sum(parts[..., j, :] << 4 * j for j in range(4))
    words = torch.where(words > 0x7FFF, words - 0x10000, words).to(torch.int16)
    return words.permute(0, 2, 3, 1, 4).contiguous().view(rows // TILE, TILE * cols // 4).view(torch.uint8)


def _assemble(
    values: Tensor, scale: Tensor | None, rows: int, cols: int, format: str, activations: str = "bf16"
) -> PackedWeight:
    """Blocks [tiles, bytes] and scales [rows, blocks, 1 or 2] -> a packed weight."""
    tiles = values.shape[0]
    data = torch.zeros((tiles, tile_bytes(cols, format)), dtype=torch.uint8)
    data[:, : values.shape[1]] = values
    if scale is not None and data.numel():
        packed = padded_rows(scale.to(torch.float16)).view(tiles, TILE, *scale.shape[1:]).permute(0, 2, 3, 1)
        packed = packed.contiguous().view(tiles, TILE * scale[0].numel()).view(torch.uint8)
        data[:, values.shape[1] : values.shape[1] + packed.shape[1]] = packed
    return PackedWeight(data, rows, cols, format, activations)
