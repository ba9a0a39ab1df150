"""gather_dequantize: the records of some slots of a coded arena, as vectors (docs/ops/gather_dequantize.md).

    out[r, h, j] = decode(codes[slots[r], h, j * code_bytes : (j + 1) * code_bytes])   0 where the slot is -1
One layer and side (keys or values) of an arena; the code is that of vq_dequantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ..book import Book
from ._checks import check_range, expect_dtype, expect_shape
from ._codec import check_codes, check_tables, code_bytes, decode, record_bytes, sample_codes, sample_tables

SCHEMA = (
    "(Tensor codes, Tensor slots, Tensor coarse, Tensor fine, Tensor? rot, *, int tokens, ScalarType dtype) -> Tensor"
)


def _check(codes, slots, coarse, fine, rot, tokens: int, dtype: torch.dtype) -> int:
    dim = check_tables(coarse, fine, rot, dtype)
    torch._check(tokens > 0, lambda: f"tokens: expected at least 1, got {tokens}")
    check_codes(codes)
    expect_shape("codes", codes, -1, -1, record_bytes(coarse, fine, tokens))
    expect_shape("slots", slots, -1)
    expect_dtype("slots", slots, torch.int32)
    return dim


def fake(codes, slots, coarse, fine, rot, *, tokens: int, dtype: torch.dtype) -> Tensor:
    dim = _check(codes, slots, coarse, fine, rot, tokens, dtype)
    return coarse.new_empty((slots.shape[0], codes.shape[1], tokens, dim), dtype=dtype)


def reference(codes, slots, coarse, fine, rot, *, tokens: int, dtype: torch.dtype) -> Tensor:
    dim = _check(codes, slots, coarse, fine, rot, tokens, dtype)
    check_range("slots", slots, -1, codes.shape[0] - 1)
    width = code_bytes(coarse, fine)
    if codes.shape[0] == 0:
        return coarse.new_zeros((slots.shape[0], codes.shape[1], tokens, dim), dtype=dtype)
    picked = codes[slots.clamp_min(0).long()][..., : tokens * width].unflatten(-1, (tokens, width))
    return torch.where((slots >= 0)[:, None, None, None], decode(picked, coarse, fine, rot, dtype), 0)


def _sample(slots, wanted, heads, tokens, dim, b, pieces, n, view=False, **options):
    def make(dtype: torch.dtype, generator: torch.Generator):
        tables = sample_tables(dim, b, pieces, n, dtype, generator, **options)
        size = record_bytes(*tables[:2], tokens)
        # In an arena [S, Lm, 2, Hm, G] one layer and side is a strided view.
        codes = sample_codes((slots, 2, 2, heads, size), generator)[:, 1, 0] if view else sample_codes(
            (slots, heads, size), generator)  # fmt: skip
        return (codes, torch.tensor(wanted, dtype=torch.int32), *tables), {"tokens": tokens, "dtype": dtype}

    return make


def cases():
    yield Case("S5_H2_K8_D80_b6_PQ8x10-view", _sample(5, [4, -1, 0, 4], 2, 8, 80, 6, 8, 10, view=True))
    yield Case("S2_H3_K3_D24_b5_PQ3x6-no-rotation", _sample(2, [1, 0], 3, 3, 24, 5, 3, 6, rotate=False))
    yield Case("S3_H1_K4_D64_b6_PQ4x8-fp16-tables", _sample(3, [2, 1], 1, 4, 64, 6, 4, 8, half_tables=True))
    yield Case("R0", _sample(2, [], 2, 4, 16, 4, 2, 4))
    yield Case("S0", _sample(0, [-1], 2, 4, 16, 4, 2, 4))
    yield Case(
        "paper_R160_H8_K8_D80_b14_PQ8x10", _sample(256, list(range(160)), 8, 8, 80, 14, 8, 10), slow=True, bench=True
    )
    # 5 memories of the paper's model (22 layers, keys and values, 8 heads of 8 tokens): 14,080 vectors.
    five = (256, list(range(220)), 8, 8, 80, 14, 8, 10)
    yield Case("paper_R220_H8_K8_D80_b14_PQ8x10", _sample(*five), slow=True, bench=True)
    yield Case("paper_R220_H8_K8_D80_b14_PQ8x10-no-rotation", _sample(*five, rotate=False), slow=True, bench=True)


def bad_cases():
    def broken(position: int | None = None, value: Tensor | None = None, tokens: int = 4):
        def make():
            codes = torch.zeros(3, 2, 16, dtype=torch.uint8)
            slots = torch.tensor([0, 2], dtype=torch.int32)
            args = [codes, slots, torch.zeros(2, 16, 8), torch.zeros(4, 16, 4), torch.eye(16)]
            if position is not None:
                args[position] = value
            return tuple(args), {"tokens": tokens, "dtype": torch.float32}

        return make

    yield BadCase("bytes", broken(tokens=6), r"codes: expected shape \[\*, \*, 32\], got \[3, 2, 16\]")
    yield BadCase("tokens", broken(tokens=0), "tokens: expected at least 1, got 0")
    yield BadCase("codes-dtype", broken(0, torch.zeros(3, 2, 16)), "codes: expected .*(uint8|Byte)")
    yield BadCase("slots-dtype", broken(1, torch.tensor([0, 2])), "slots: expected .*[iI]nt")
    for name, value in (("high", 3), ("low", -2)):
        bad = torch.tensor([0, value], dtype=torch.int32)
        yield BadCase(f"slot-{name}", broken(1, bad), rf"slots\[1\]: expected -1..2, got {value}", fake=False)


def cost(codes, slots, coarse, fine, rot, *, tokens: int, dtype: torch.dtype) -> Cost:
    dim, vectors = 2 * coarse.shape[2], slots.shape[0] * codes.shape[1] * tokens
    entries = sum(min(t.nbytes, vectors * t.shape[0] * t.shape[2] * t.element_size()) for t in (coarse, fine))
    read = slots.shape[0] * codes.shape[1] * codes.shape[2] + slots.nbytes + (0 if rot is None else rot.nbytes)
    return Cost(read + entries + vectors * dim * dtype.itemsize, vectors * dim * (1 + (0 if rot is None else 2 * dim)))


OP = register(
    Op(
        name="gather_dequantize",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    )
)


def gather_dequantize(
    codes: Tensor, slots: Tensor, book: Book, *, tokens: int, dtype: torch.dtype = torch.float32, rotate: bool = True
) -> Tensor:
    """Decodes the records of the given slots of a coded arena (docs/ops/gather_dequantize.md).

    Args:
        codes: [S, Hm, G] uint8, one layer and side of an arena, last stride 1; G = tokens * code_bytes padded to a
            multiple of 16, token j at byte j * code_bytes.
        slots: [R] int32, -1..S-1; -1 gives zeros, a slot may appear several times.
        book: as for vq_dequantize.
        tokens: K, vectors per record and head.
        dtype: of the result: float32, bfloat16 or float16 (float64 on the reference).
        rotate: False leaves the vectors in the basis they were coded in (book.rot is not applied).

    Returns:
        [R, Hm, K, D], contiguous.

    Raises:
        RuntimeError: shapes or dtypes do not match, a slot lies outside -1..S-1, or a table requires a gradient.
    """
    rot = book.rot if rotate else None
    if dtype is torch.float64:
        return reference(codes, slots, book.coarse, book.fine, rot, tokens=tokens, dtype=dtype)
    return OP(codes, slots, book.coarse, book.fine, rot, tokens, dtype)
