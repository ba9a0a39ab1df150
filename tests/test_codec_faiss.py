"""Our decoder against FAISS' own, on trained indexes and at the paper's full codebook size."""

from __future__ import annotations

import faiss_books
import numpy as np
import pytest
import torch

from memory3_kernels import Book, gather_dequantize, use_backend, vq_dequantize
from memory3_kernels.ops._codec import code_bytes, record_bytes

# Coarse codes of one, two and two bytes; fine codes that end on a byte and that do not; 4 to 11 bits.
SPECS = [
    ("OPQ20_80,Residual2x6,PQ8x10", 80),  # the paper's, with smaller coarse tables
    ("OPQ8_64,Residual2x5,PQ8x7", 64),
    ("Residual2x4,PQ3x4", 24),
    ("OPQ4_16,Residual2x7,PQ4x8", 16),
    ("Residual2x8,PQ5x9", 40),
    ("OPQ4_128,Residual2x5,PQ16x6", 128),
    ("Residual2x9,PQ2x10", 8),
]


@pytest.fixture(scope="module", params=SPECS, ids=[spec for spec, _ in SPECS])
def trained(request):
    spec, dim = request.param
    index = faiss_books.trained(spec, dim)
    codes = index.sa_encode(faiss_books.random_vectors(200, dim, seed=1))
    return index, torch.from_numpy(codes)


def assert_like_faiss(actual: torch.Tensor, index, codes: torch.Tensor) -> None:
    expected = torch.from_numpy(index.sa_decode(np.ascontiguousarray(codes.numpy())))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", ["reference", None])
def test_decodes_like_faiss(trained, backend):
    index, codes = trained
    book = faiss_books.book_of(index)
    assert code_bytes(book.coarse, book.fine) == index.sa_code_size() == codes.shape[1]
    if backend is None:
        actual = vq_dequantize(codes, book)
    else:
        with use_backend(backend):
            actual = vq_dequantize(codes, book)
    assert_like_faiss(actual, index, codes)


def test_random_bytes_decode_like_faiss(trained):
    """Every bit pattern is a code: indices the encoder never chose are covered too."""
    index, codes = trained
    draw = torch.Generator().manual_seed(0)
    anything = torch.randint(0, 256, codes.shape, generator=draw, dtype=torch.uint8)
    book = faiss_books.book_of(index)
    coarse_bits = 2 * (book.coarse.shape[1].bit_length() - 1)
    used = coarse_bits % 8
    if used:  # FAISS takes the coarse code as a list number, which must exist; ours ignores the unused bits
        anything[:, coarse_bits // 8] &= (1 << used) - 1
    assert_like_faiss(vq_dequantize(anything, book), index, anything)


def test_gathered_records_decode_like_faiss(trained):
    index, codes = trained
    book = faiss_books.book_of(index)
    tokens, heads, slots = 5, 2, 4
    width, size = codes.shape[1], record_bytes(book.coarse, book.fine, 5)
    arena = torch.full((slots, heads, size), 255, dtype=torch.uint8)
    rows = codes[: slots * heads * tokens].reshape(slots, heads, tokens * width)
    arena[..., : tokens * width] = rows
    chosen = torch.tensor([3, -1, 0], dtype=torch.int32)
    actual = gather_dequantize(arena, chosen, book, tokens=tokens)
    assert not actual[1].any()
    for r in (0, 2):
        assert_like_faiss(actual[r].reshape(-1, index.d), index, rows[chosen[r]].reshape(-1, width))


def test_without_rotation_vectors_stay_in_the_coded_basis(trained):
    index, codes = trained
    book = faiss_books.book_of(index)
    rotated = vq_dequantize(codes, book._replace(rot=None))
    if book.rot is not None:
        torch.testing.assert_close(rotated @ book.rot, vq_dequantize(codes, book), rtol=1e-4, atol=1e-4)
    size = record_bytes(book.coarse, book.fine, 1)
    arena = torch.zeros(len(codes), 1, size, dtype=torch.uint8)
    arena[:, 0, : codes.shape[1]] = codes
    slots = torch.arange(len(codes), dtype=torch.int32)
    kept = gather_dequantize(arena, slots, book, tokens=1, rotate=False)
    assert torch.equal(kept.reshape(rotated.shape), rotated)


def test_paper_shape_decodes_like_faiss():
    """OPQ20_80,Residual2x14,PQ8x10 at full size, its tables random instead of trained: 14 bytes per vector."""
    index = faiss_books.untrained("OPQ20_80,Residual2x14,PQ8x10", 80)
    assert index.sa_code_size() == 14
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (500, 14), generator=draw, dtype=torch.uint8)
    codes[:, 3] &= 0x0F  # 28 coarse bits
    book = faiss_books.book_of(index)
    assert_like_faiss(vq_dequantize(codes, book), index, codes)
    half = Book(book.coarse.half(), book.fine.half(), book.rot)
    error = (vq_dequantize(codes, half) - vq_dequantize(codes, book)).abs().max()
    assert 0 < error < 5e-3  # float16 tables are another codec: close, not equal
