"""How the CUDA kernels cut decoding into blocks, and when the fine table lies in shared memory
(csrc/vq_dequantize/heuristics.h)."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from simt import build

SOURCE = """
#include "vq_dequantize/heuristics.h"
extern "C" void shape(const int64_t* in, int64_t* out) {
  const auto s = m3::gpu::dequantize_shape(in[0], in[1], in[2], in[3] != 0);
  out[0] = s.blocks, out[1] = s.staged;
}
"""


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    function = build.host_function(SOURCE, "shape", tmp_path_factory.mktemp("shape"))

    def call(vectors, fine_bytes, entries, rotated):
        found = (ctypes.c_int64 * 2)()
        function((ctypes.c_int64 * 4)(vectors, fine_bytes, entries, rotated), found)
        return found[0], bool(found[1])

    return call


# (vectors, bytes of the fine table, entries of a part, rotated) -> (blocks, the table in shared memory)
TABLE = {
    "one vector": ((1, 327680, 1024, True), (1, False)),
    "paper, a layer and side of one sequence": ((320, 327680, 1024, True), (5, False)),
    "paper, batch 32: one block for every 64 vectors": ((10240, 327680, 1024, True), (160, False)),
    "a rotation is set up 528 times at the most": ((450560, 327680, 1024, True), (528, False)),
    "without one, twice as many blocks": ((450560, 327680, 1024, False), (1056, False)),
    "64 values in 8 x 8 bits, fp16: 512 vectors per block": ((270336, 32768, 256, True), (528, True)),
    "one vector fewer": ((270335, 32768, 256, True), (528, False)),
    "16 entries are soon worth it": ((16896, 2560, 16, False), (264, True)),
    "80 values in 8 x 8 bits, fp16: just fits": ((270336, 40960, 256, False), (528, True)),
    "in fp32 it does not": ((270336, 81920, 256, False), (1056, False)),
    "nothing": ((0, 32768, 256, False), (0, False)),
}


@pytest.mark.parametrize("arguments, expected", list(TABLE.values()), ids=list(TABLE))
def test_table(shape, arguments, expected):
    assert shape(*arguments) == expected


def test_copying_the_table_is_less_than_looking_up(shape):
    """Every block that keeps it reads as many entries of each part as the table has, or more."""
    vectors = (1, 1000, 20000, 300000, 5000000)
    for count, bits, width, rotated in itertools.product(vectors, range(4, 11), (64, 80, 128), (False, True)):
        blocks, staged = shape(count, 2 * width << bits, 1 << bits, rotated)
        assert 0 < blocks <= 1056 and (blocks - 1) * 64 < count
        assert not staged or count / blocks >= 1 << bits
