"""Tile sizes and numbers of splits: host integers in, constants out, no device asked. Tested as a table
(tests/gpu/test_triton_heuristics.py); nothing here has been tuned on hardware: the reasons are arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

# Programs that fill the devices this is for: 108 to 148 multiprocessors (A100, H100, B200), 2 programs each at the
# shared memory the tiles below take. Below that the context is split.
PROGRAMS = 2 * 132
# A split reads at least this many tokens: below, its start (a query tile, a softmax to merge) costs more than its share
# of the context, 256 tokens x 2 x 128 x 2 bytes = 128 KiB, a few microseconds of one multiprocessor's bandwidth.
MIN_SPLIT = 256
# Partial results are float32 and written and read once each: per split and row 2 x 4 D bytes, against 4 D bytes per
# token of context for each KV head and G rows. 64 splits keep the merge kernel's weights in one tile.
MAX_SPLITS = 64


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


class RecordTile(NamedTuple):
    """Lanes of record tokens: `padded` per record, so that a reshape sums each record."""

    lanes: int
    padded: int


def record_tile(refs: int, tokens: int, dim: int, element_size: int, coded: bool = False,
                most: int = 64) -> RecordTile:  # fmt: skip
    """How many record tokens a tile has: all of them if few, at most `most` lanes or 16 KiB each of keys and values,
    what a context tile takes, at least 16, the smallest product of tensor cores. Coded ones 16: each value of a tile
    is gathered by an address of its own, and 32 lanes x 128 values fill 255 registers of 128 threads. 16 beyond 128
    values too: with 32 lanes decode_kernel has 8 to 16 bytes of stack on sm_90 and sm_100."""
    most = 16 if coded or dim > 128 else max(16, min(most, 16384 // (power_of_two(dim, 16) * element_size)))
    padded = min(power_of_two(max(tokens, 1)), most)
    lanes = min(most, power_of_two(max(refs, 1) * padded, 16))
    return RecordTile(lanes, min(padded, lanes))


class DecodeTile(NamedTuple):
    rows: int  # M: packed (query, head) rows of a tile
    tokens: int  # N: context tokens of a tile
    splits: int  # parts of the context; 1: records and context in one program, no merge
    warps: int
    stages: int


def decode_tile(sequences: int, kv_heads: int, group: int, max_q: int, max_kv: int, dim: int,
                element_size: int) -> DecodeTile:  # fmt: skip
    """Tiles of memory_decode, and parts of the context.

    Rows: the group and the new tokens packed, padded to the 16 of mma; at most 64, as accumulators of 64 x 256 floats
    take 128 registers per thread of 4 warps. Tokens: 16 KiB each of keys and values in 2 stages are 64 KiB: two
    programs on an sm_80 multiprocessor, one on sm_86, 89 and 120 (99 KiB); half for float32, whose exact products keep
    operands in registers.
    """
    rows, row = min(power_of_two(group * max_q, 16), 64), power_of_two(dim, 16) * element_size
    tokens = max(16, min(64, 16384 // row) // (element_size // 2))
    blocks = -(-group * max_q // rows)
    programs = max(1, sequences * kv_heads * blocks)
    wanted = -(-PROGRAMS // programs)
    splits = max(1, min(wanted, max_kv // MIN_SPLIT, MAX_SPLITS))
    # Accumulators and keys in rows of 512 bytes and more spill with 4 warps.
    return DecodeTile(rows, tokens, splits, warps=8 if row > 256 else 4, stages=2)


class PrefillTile(NamedTuple):
    rows: int  # M: packed (query, head) rows of a tile
    tokens: int  # N: context tokens of a tile
    warps: int
    stages: int


# (M, N) of prefill_tile by the power of two above the head dim, up to: for 2 bytes an element, and for 4.
PREFILL_TILES = {64: ((128, 64), (32, 32)), 128: ((128, 32), (16, 16)), 256: ((64, 32), (16, 16))}


def prefill_tile(packed_rows: int, dim: int, element_size: int) -> PrefillTile:
    """Tiles of memory_attention for chunks of `packed_rows` = queries x group.

    Per thread a tile keeps M x DP / threads accumulators, the fragments of its queries (half as many registers) and two
    tiles of scores, M x N / threads each, in 255 registers; 64 + 32 + 2 x 16 of the 128 x 128 x 32 tile and the
    addresses of copies under way are what fits without spilling on sm_80 (tests/gpu/test_triton_compile.py). Float32
    takes three products in tf32, whose operands are twice as wide and there twice. Half the rows where whole tiles
    would be more than a fifth above what there is: 64 queries x 3 heads are 3 x 64 rows, not 2 x 128.
    """
    width = max(64, power_of_two(dim))
    most, tokens = PREFILL_TILES[width][element_size == 4]
    rows = min(most, power_of_two(packed_rows, 16))
    if -(-packed_rows // rows) * rows > 1.2 * packed_rows and rows > 32:
        rows //= 2
    wide = rows > 64 or (width > 128 and rows > 32)  # 16 rows per warp; at 256 values two warps share them
    return PrefillTile(rows, tokens, warps=8 if wide else 4, stages=2)


class SelectTile(NamedTuple):
    rows: int  # M: packed (query, head) rows of a tile
    keys: int  # N: keys of a tile
    whole: bool  # one tile holds every key: no pass for the rows' sums
    warps: int
    stages: int


def select_tile(keys: int, dim: int, element_size: int) -> SelectTile:
    """Tiles of select_tokens, for references of `keys` rows.

    All keys of a reference in one tile up to 64 KiB, beside the query tiles' 2 x 16 KiB within the 99 KiB of sm_86;
    else 32 KiB. Scores and column sums, up to three float32 tiles of M x N values, are 96 registers of 256 threads:
    there is one program per (reference, KV head), often fewer than multiprocessors, so that it takes 8 warps of each.
    At most 32 rows of 512 bytes or more: 64 leave 8 to 24 bytes of stack from sm_86 on. Half the keys and a quarter of
    the rows for float32, whose products in three parts have operands of twice the size, twice.
    """
    row, part = power_of_two(dim, 16) * element_size, element_size // 2
    wanted = power_of_two(max(keys, 1), 16)
    whole = wanted <= 256 and wanted * row <= 65536 // part
    tile = wanted if whole else min(wanted, 128, max(16, 32768 // part // row))
    most = 64 if row <= 256 else 32
    return SelectTile(rows=max(16, min(most, 8192 // tile) // part**2), keys=tile, whole=whole, warps=8, stages=2)


class GradientTile(NamedTuple):
    rows: int  # M: packed (query, head) rows of a tile
    tokens: int  # N: context tokens, or tokens of a record
    warps: int
    stages: int


# (M, N, warps) of query_gradient_tile and (M, most N) of key_gradient_tile, by the power of two above the head dim.
QUERY_GRADIENT_TILES = {64: (64, 32, 4), 128: (64, 32, 8), 256: (16, 16, 4)}
KEY_GRADIENT_TILES = {64: (32, 64), 128: (32, 64), 256: (32, 32)}


def query_gradient_tile(packed_rows: int, dim: int, element_size: int) -> GradientTile:
    """Tiles of dq. Fragments of q and of grad_out stay in registers beside M x DP accumulators, and scores and their
    gradients are two tiles of M x N: rows or head dim are shared by twice the warps of the forward, or half as many
    rows are taken; at 256 values a quarter, since 32 rows leave 24 to 32 bytes of stack on sm_100 and sm_120. Float32:
    see prefill_tile."""
    rows, tokens, warps = (16, 16, 4) if element_size == 4 else QUERY_GRADIENT_TILES[max(64, power_of_two(dim))]
    return GradientTile(min(rows, power_of_two(packed_rows, 16)), tokens, warps, stages=2)


def key_gradient_tile(tokens: int, dim: int, element_size: int) -> GradientTile:
    """Tiles of dk and dv, of context or of one record: 2 N x DP accumulators beside the fragments of k and v. Four
    warps up to 4096 values, 64 accumulators per thread, else eight, as for float32 beyond 64. Against 16 tokens rows
    come by 16: with 32 the record kernel lies a few registers above 128, and ptxas spills them so that four programs
    share a multiprocessor."""
    width = max(64, power_of_two(dim))
    rows, most = (16, 32 if width == 64 else 16) if element_size == 4 else KEY_GRADIENT_TILES[width]
    taken = min(most, power_of_two(tokens, 16))
    wide = taken * width > 4096 or (element_size == 4 and width > 64)
    return GradientTile(min(rows, taken), taken, warps=8 if wide else 4, stages=2)
