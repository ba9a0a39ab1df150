"""Tiles and splits as a table: a change of a threshold shows here as a change of numbers."""

from __future__ import annotations

import pytest

from memory3_kernels.triton import _heuristics as h

PAPER, SMOL, LLAMA = (8, 5, 80), (3, 3, 64), (8, 4, 128)  # KV heads, group, head dim


@pytest.mark.parametrize(
    "sequences, model, max_q, max_kv, tile",
    [
        # Batch 32 of the paper's model: 256 programs, one split, records and context in one softmax.
        (32, PAPER, 1, 256, (16, 64, 1, 4, 2)),
        (32, PAPER, 1, 4096, (16, 64, 2, 4, 2)),
        # One sequence: split until 264 programs, in parts of 256 tokens at least.
        (1, PAPER, 1, 256, (16, 64, 1, 4, 2)),
        (1, PAPER, 1, 4096, (16, 64, 16, 4, 2)),
        (1, PAPER, 1, 131072, (16, 64, 33, 4, 2)),
        (1, SMOL, 1, 131072, (16, 64, 64, 4, 2)),
        (8, LLAMA, 1, 4096, (16, 64, 5, 4, 2)),
        # 16 new tokens x 5 heads are 80 rows: two tiles of 64.
        (1, PAPER, 16, 1024, (64, 64, 4, 4, 2)),
        (1, (4, 2, 256), 1, 1024, (16, 32, 4, 8, 2)),
        (1, PAPER, 1, 0, (16, 64, 1, 4, 2)),
    ],
)
def test_decode(sequences, model, max_q, max_kv, tile):
    kv_heads, group, dim = model
    assert h.decode_tile(sequences, kv_heads, group, max_q, max_kv, dim, 2) == tile


def test_decode_in_float32():
    """Half the tokens; rows of 512 bytes are shared by eight warps."""
    assert h.decode_tile(1, 3, 3, 1, 256, 64, 4) == (16, 32, 1, 4, 2)
    assert h.decode_tile(1, 8, 5, 1, 256, 80, 4) == (16, 16, 1, 8, 2)


@pytest.mark.parametrize(
    "refs, tokens, dim, size, coded, most, tile",
    [
        (5, 8, 80, 2, False, 64, (64, 8)),  # 40 tokens in one tile
        (5, 32, 64, 2, False, 64, (64, 32)),  # two records a tile
        (1, 300, 64, 2, False, 64, (64, 64)),  # a record in several tiles
        (5, 8, 80, 2, False, 32, (32, 8)),
        (5, 8, 256, 2, False, 64, (16, 8)),
        (5, 8, 80, 2, True, 64, (16, 8)),
        (0, 0, 64, 2, False, 64, (16, 1)),
    ],
)
def test_records(refs, tokens, dim, size, coded, most, tile):
    assert h.record_tile(refs, tokens, dim, size, coded, most) == tile


@pytest.mark.parametrize(
    "packed, dim, size, tile",
    [
        (64 * 5, 80, 2, (128, 32, 8, 2)),  # 3 x 128 rows, a fifth more than there are
        (64 * 3, 64, 2, (64, 64, 4, 2)),  # 2 x 128 would be a third more
        (64 * 4, 128, 2, (128, 32, 8, 2)),
        (64 * 2, 256, 2, (64, 32, 8, 2)),
        (5, 80, 2, (16, 32, 4, 2)),
        (64 * 3, 64, 4, (32, 32, 4, 2)),
        (64 * 5, 80, 4, (16, 16, 4, 2)),
    ],
)
def test_prefill(packed, dim, size, tile):
    assert h.prefill_tile(packed, dim, size) == tile


@pytest.mark.parametrize(
    "packed, tokens, dim, size, queries, keys",
    [
        (320, 256, 80, 2, (64, 32, 8, 2), (32, 64, 8, 2)),
        (192, 256, 64, 2, (64, 32, 4, 2), (32, 64, 4, 2)),
        (256, 8, 128, 2, (64, 32, 8, 2), (16, 16, 4, 2)),
        (128, 256, 256, 2, (16, 16, 4, 2), (32, 32, 8, 2)),
        (192, 256, 64, 4, (16, 16, 4, 2), (16, 32, 4, 2)),
        (320, 256, 80, 4, (16, 16, 4, 2), (16, 16, 8, 2)),
    ],
)
def test_gradients(packed, tokens, dim, size, queries, keys):
    assert h.query_gradient_tile(packed, dim, size) == queries
    assert h.key_gradient_tile(tokens, dim, size) == keys


@pytest.mark.parametrize(
    "keys, dim, size, tile",
    [
        (128, 80, 2, (64, 128, True, 8, 2)),
        (136, 64, 2, (32, 256, True, 8, 2)),
        (300, 128, 2, (64, 128, False, 8, 2)),
        (128, 256, 2, (32, 128, True, 8, 2)),
        (128, 128, 4, (16, 32, False, 8, 2)),
        (0, 64, 2, (64, 16, True, 8, 2)),
    ],
)
def test_selection(keys, dim, size, tile):
    assert h.select_tile(keys, dim, size) == tile
