"""The two-stage code of vectors, shared by the ops that read it: bit layout, table checks, decoding in PyTorch.

A code is ceil(2b / 8) bytes with the two coarse indices, then ceil(M n / 8) bytes with the M fine ones, each index
lowest bit first: what FAISS writes for `OPQ{M}_{D},Residual2x{b},PQ{M'}x{n}` (Index2Layer, whose coarse part is padded
to whole bytes before the fine part starts). x = rot^T (coarse part + fine part).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import expect_dtype, expect_shape, expect_unit_stride

MIN_BITS, MAX_BITS = 4, 14
MAX_DIM = 1024
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLES = (torch.float32, torch.float16, torch.float64)  # float64 on the reference only


def index_bits(table: Tensor) -> int:
    """log2 of the number of entries of a [parts, entries, width] table."""
    return table.shape[1].bit_length() - 1


def coarse_bytes(coarse: Tensor) -> int:
    return (2 * index_bits(coarse) + 7) // 8


def code_bytes(coarse: Tensor, fine: Tensor) -> int:
    """Bytes of one vector's code."""
    return coarse_bytes(coarse) + (fine.shape[0] * index_bits(fine) + 7) // 8


def record_bytes(coarse: Tensor, fine: Tensor, tokens: int) -> int:
    """G: bytes of the codes of one record head, `tokens` vectors padded to a multiple of 16."""
    return (tokens * code_bytes(coarse, fine) + 15) // 16 * 16


def check_tables(coarse: Tensor, fine: Tensor, rot: Tensor | None, dtype: torch.dtype, side: str = "") -> int:
    """Shapes and dtypes of a book and of the output; returns D. `side` goes before the names of the tables."""
    expect_shape(f"{side}coarse", coarse, 2, -1, -1)
    expect_shape(f"{side}fine", fine, -1, -1, -1)
    torch._check(
        coarse.dtype in TABLES, lambda: f"{side}coarse: expected float32 or float16 tables, got {coarse.dtype}"
    )
    expect_dtype(f"{side}fine", fine, coarse.dtype)
    for name, table in (("coarse", coarse), ("fine", fine)):
        entries = table.shape[1]
        torch._check(
            entries & (entries - 1) == 0 and MIN_BITS <= entries.bit_length() - 1 <= MAX_BITS,
            lambda name=name, entries=entries: (
                f"{side}{name}: expected 2^{MIN_BITS} to 2^{MAX_BITS} entries, got {entries}"
            ),
        )
    dim = 2 * coarse.shape[2]
    torch._check(
        8 <= dim <= MAX_DIM and dim % 8 == 0,
        lambda: (
            f"{side}coarse: expected entries of half a head dimension that is a multiple of 8 up to {MAX_DIM}, "
            f"got {coarse.shape[2]}"
        ),
    )
    torch._check(
        fine.shape[0] > 0 and fine.shape[0] * fine.shape[2] == dim,
        lambda: (
            f"{side}fine: expected pieces that make up {dim} values together, got {fine.shape[0]} x {fine.shape[2]}"
        ),
    )
    if rot is not None:
        expect_shape(f"{side}rot", rot, dim, dim)
        wanted = torch.float64 if coarse.dtype is torch.float64 else torch.float32
        expect_dtype(f"{side}rot", rot, wanted)
    torch._check(dtype in OUTPUTS, lambda: f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return dim


def check_codes(codes: Tensor) -> None:
    expect_dtype("codes", codes, torch.uint8)
    expect_unit_stride("codes", codes)


def _index(codes: Tensor, bit: int, bits: int) -> Tensor:
    """The `bits` bits of [..., code_bytes] int64 codes from `bit` on, lowest first."""
    word = 0
    for i in range(bit // 8, min(codes.shape[-1], (bit + bits + 7) // 8)):
        word = word | codes[..., i] << 8 * (i - bit // 8)
    return (word >> bit % 8) & ((1 << bits) - 1)


def decode(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes uint8 [..., code_bytes] -> [..., D] of `dtype`, computed in float32 (float64 for float64 tables)."""
    wide = torch.float64 if coarse.dtype is torch.float64 else torch.float32
    words = codes.long()
    b, n, first = index_bits(coarse), index_bits(fine), 8 * coarse_bytes(coarse)
    halves = [coarse[i][_index(words, i * b, b)].to(wide) for i in range(2)]
    pieces = [fine[m][_index(words, first + m * n, n)].to(wide) for m in range(fine.shape[0])]
    rotated = torch.cat(halves, -1) + torch.cat(pieces, -1)
    return (rotated if rot is None else rotated @ rot.to(wide)).to(dtype)


def sample_tables(dim, b, pieces, n, dtype, generator, rotate=True, half_tables=False):
    """(coarse, fine, rot) with random entries and a random orthonormal rotation."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=wide)

    coarse, fine = draw(2, 1 << b, dim // 2), 0.3 * draw(pieces, 1 << n, dim // pieces)
    rot = torch.linalg.qr(draw(dim, dim)).Q.contiguous() if rotate else None
    return (coarse.half(), fine.half(), rot) if half_tables else (coarse, fine, rot)


def sample_codes(shape, generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
