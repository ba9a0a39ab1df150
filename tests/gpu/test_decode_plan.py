"""How the CUDA kernels cut memory_decode into blocks (csrc/memory_decode/heuristics.h): a table, and what must hold for
every shape."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from simt import build

SOURCE = """
#include "memory_decode/heuristics.h"
extern "C" void plan(const int64_t* in, int32_t* out) {
  const auto p = m3::gpu::decode_plan(in[0], in[1], in[2], in[3], in[4], in[5], in[6] != 0);
  out[0] = p.row_tiles, out[1] = p.splits, out[2] = p.split_tiles, out[3] = p.memory_tiles, out[4] = p.parts;
}
"""
TILE, ROWS = 16, 16


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    function = build.host_function(SOURCE, "plan", tmp_path_factory.mktemp("plan"))

    def call(sequences, kv_heads, group, max_q, max_kv, memory_tokens, apart=False):
        numbers = (ctypes.c_int64 * 7)(sequences, kv_heads, group, max_q, max_kv, memory_tokens, apart)
        found = (ctypes.c_int32 * 5)()
        function(numbers, found)
        return tuple(found)

    return call


# (sequences, KV heads, group, new tokens, context, memory tokens, apart) ->
# (row tiles, splits, tiles in a split, memory tiles, parts)
TABLE = {
    "paper: 256 blocks are enough, memory comes first": ((32, 8, 5, 1, 256, 40, False), (1, 1, 16, 3, 1)),
    "paper, coded: memory is a part of its own": ((32, 8, 5, 1, 256, 40, True), (1, 1, 16, 3, 2)),
    "256 tokens per split": ((1, 8, 5, 1, 512, 40, False), (1, 2, 16, 3, 3)),
    "just too short to split": ((1, 8, 4, 1, 511, 40, False), (1, 1, 32, 3, 1)),
    "Llama-3-8B, one sequence: 16 splits of 256 tokens": ((1, 8, 4, 1, 4096, 40, False), (1, 16, 16, 3, 17)),
    "longer: about 132 blocks, then longer splits": ((1, 8, 4, 1, 131072, 40, False), (1, 17, 482, 3, 18)),
    "Llama-3-8B, batch 32: 1,024 blocks": ((32, 8, 4, 1, 4096, 40, False), (1, 4, 64, 3, 5)),
    "131 blocks: split in two": ((131, 1, 4, 1, 4096, 0, False), (1, 2, 128, 0, 2)),
    "132 blocks: only splits of 1,024 tokens": ((132, 1, 4, 1, 2047, 0, False), (1, 1, 128, 0, 1)),
    "132 blocks, long enough": ((132, 1, 4, 1, 2048, 0, False), (1, 2, 64, 0, 2)),
    "132 blocks, long: six per SM": ((132, 1, 4, 1, 131072, 0, False), (1, 6, 1366, 0, 6)),
    "792 blocks: never split": ((792, 1, 4, 1, 131072, 0, False), (1, 1, 8192, 0, 1)),
    "16 vectors: 512 tokens per split": ((1, 1, 16, 1, 2048, 0, False), (1, 4, 32, 0, 4)),
    "80 vectors: five row tiles": ((1, 2, 5, 16, 4096, 8, False), (5, 8, 32, 1, 9)),
    "no memory, apart": ((4, 2, 1, 1, 64, 0, True), (1, 1, 4, 0, 1)),
    "memory only": ((4, 2, 1, 1, 0, 40, False), (1, 1, 0, 3, 1)),
    "nothing": ((0, 2, 1, 0, 0, 0, False), (0, 1, 0, 0, 1)),
}


@pytest.mark.parametrize("arguments, expected", list(TABLE.values()), ids=list(TABLE))
def test_table(plan, arguments, expected):
    assert plan(*arguments) == expected


def test_every_token_is_in_one_part(plan):
    shapes = itertools.product((1, 3, 33, 200), (1, 8), (1, 5, 16), (1, 7), (0, 1, 127, 2000, 70001), (0, 17), (0, 1))
    for sequences, kv_heads, group, max_q, max_kv, memory, apart in shapes:
        shape = (sequences, kv_heads, group, max_q, max_kv, memory, apart)
        row_tiles, splits, split_tiles, memory_tiles, parts = plan(*shape)
        tiles = -(-max_kv // TILE)
        assert row_tiles * ROWS >= max_q * group > (row_tiles - 1) * ROWS, shape
        assert splits * split_tiles >= tiles and (splits == 1 or (splits - 1) * split_tiles < tiles), shape
        assert memory_tiles == -(-memory // TILE), shape
        own = bool(memory) and (bool(apart) or splits > 1)
        assert parts == splits + own, shape


def test_results_of_parts_are_little_traffic(plan):
    """Written and read in float32, they are at most an eighth of the keys and values of the context."""
    for group, max_kv, memory in itertools.product((1, 3, 5, 16), (256, 300, 1024, 5000), (0, 40)):
        _, splits, _, _, parts = plan(1, 4, group, 1, max_kv, memory)
        if splits > 1:
            assert parts * 2 * 4 * group <= max_kv * 2 * 2 / 8, (group, max_kv, memory)
