"""vq_dequantize: vectors from their codes (docs/ops/vq_dequantize.md).

    x = rot^T ([coarse[0][i0]; coarse[1][i1]] + [fine[0][j0]; ...; fine[M-1][jM-1]])
with i0, i1, j0, ... read from the code: FAISS' `OPQ,Residual2x{b},PQ{M}x{n}` (Memory3, arXiv 2407.01178, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ..book import Book
from ._checks import expect_shape
from ._codec import check_codes, check_tables, code_bytes, decode, sample_codes, sample_tables

SCHEMA = "(Tensor codes, Tensor coarse, Tensor fine, Tensor? rot, *, ScalarType dtype) -> Tensor"


def _check(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, dtype: torch.dtype) -> int:
    dim = check_tables(coarse, fine, rot, dtype)
    check_codes(codes)
    width = code_bytes(coarse, fine)
    if codes.dim() == 0:
        expect_shape("codes", codes, width)
    torch._check(
        codes.shape[-1] == width,
        lambda: f"codes: expected {width} bytes per vector (the last dimension), got {codes.shape[-1]}",
    )
    return dim


def fake(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    dim = _check(codes, coarse, fine, rot, dtype)
    return coarse.new_empty((*codes.shape[:-1], dim), dtype=dtype)


def reference(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    _check(codes, coarse, fine, rot, dtype)
    return decode(codes, coarse, fine, rot, dtype)


def _sample(lead, dim, b, pieces, n, **options):
    def make(dtype: torch.dtype, generator: torch.Generator):
        tables = sample_tables(dim, b, pieces, n, dtype, generator, **options)
        codes = sample_codes((*lead, code_bytes(*tables[:2])), generator)
        return (codes, *tables), {"dtype": dtype}

    return make


def cases():
    yield Case("D80_b6_PQ8x10", _sample((37,), 80, 6, 8, 10))
    yield Case("D64_b5_PQ8x7-grid", _sample((2, 3, 5), 64, 5, 8, 7))
    yield Case("D24_b4_PQ3x4-no-rotation", _sample((19,), 24, 4, 3, 4, rotate=False))
    yield Case("D8_b7_PQ4x13-fp16-tables", _sample((6,), 8, 7, 4, 13, half_tables=True))
    yield Case("D40_b9_PQ20x5", _sample((4, 4), 40, 9, 20, 5))
    yield Case("D128_b8_PQ16x8-fp16-tables", _sample((9,), 128, 8, 16, 8, half_tables=True, rotate=False))
    yield Case("N0", _sample((0,), 16, 4, 2, 4))
    yield Case("one-vector", _sample((), 16, 4, 2, 6))
    yield Case("paper_N14080_D80_b14_PQ8x10", _sample((14080,), 80, 14, 8, 10), slow=True, bench=True)


def bad_cases():
    def broken(position: int | None = None, value: Tensor | None = None, dtype: torch.dtype = torch.float32):
        def make():
            args = [torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(2, 16, 8), torch.zeros(4, 16, 4), torch.eye(16)]
            if position is not None:
                args[position] = value
            return tuple(args), {"dtype": dtype}

        return make

    yield BadCase(
        "code-bytes", broken(0, torch.zeros(3, 4, dtype=torch.uint8)), "codes: expected 3 bytes per vector .*, got 4"
    )
    yield BadCase("codes-dtype", broken(0, torch.zeros(3, 3)), "codes: expected .*(uint8|Byte)")
    yield BadCase("entries", broken(1, torch.zeros(2, 17, 8)), r"coarse: expected 2\^4 to 2\^14 entries, got 17")
    yield BadCase("bits", broken(2, torch.zeros(4, 8, 4)), r"fine: expected 2\^4 to 2\^14 entries, got 8")
    yield BadCase("pieces", broken(2, torch.zeros(4, 16, 8)), "fine: expected pieces that make up 16 .*, got 4 x 8")
    yield BadCase("tables", broken(2, torch.zeros(4, 16, 4).half()), "fine: expected .*[fF]loat")
    yield BadCase("rot", broken(3, torch.eye(8)), r"rot: expected shape \[16, 16\], got \[8, 8\]")
    yield BadCase("dtype", broken(dtype=torch.int32), "dtype: expected float32, bfloat16 or float16, got")


def cost(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, *, dtype: torch.dtype) -> Cost:
    dim = 2 * coarse.shape[2]
    vectors = codes.numel() // codes.shape[-1]
    # Every table once, or the entries in use where they are fewer.
    entries = sum(min(t.nbytes, vectors * t.shape[0] * t.shape[2] * t.element_size()) for t in (coarse, fine))
    moved = codes.nbytes + entries + (0 if rot is None else rot.nbytes) + vectors * dim * dtype.itemsize
    return Cost(moved, vectors * dim * (1 + (0 if rot is None else 2 * dim)))


OP = register(
    Op(
        name="vq_dequantize",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    )
)


def vq_dequantize(codes: Tensor, book: Book, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors from their codes (Memory3, arXiv 2407.01178, section 3.3; docs/ops/vq_dequantize.md).

    Args:
        codes: [..., code_bytes] uint8, last stride 1; code_bytes = ceil(2b / 8) + ceil(M n / 8).
        book: coarse [2, 2^b, D/2] and fine [M, 2^n, D/M], float32 or float16 (equal), b and n from 4 to 14; rot [D, D]
            float32 or None. D is a multiple of 8.
        dtype: of the result: float32, bfloat16 or float16 (float64 on the reference). Sums are float32 in any case.

    Returns:
        [..., D], contiguous. With float32 tables it equals what FAISS' `sa_decode` gives for the same bytes to
        1e-5 of the largest value. With book.rot None the vectors stay in the rotated basis.

    Raises:
        RuntimeError: shapes or dtypes do not match, or a table requires a gradient.
    """
    if dtype is torch.float64:
        return reference(codes, book.coarse, book.fine, book.rot, dtype=dtype)
    return OP(codes, book.coarse, book.fine, book.rot, dtype)
