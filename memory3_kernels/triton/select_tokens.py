"""select_tokens: one program per (reference, KV head): scores, softmax, column sums and the choice.

Rows are packed (query, head of the group) pairs. Where all keys fit one tile a row's softmax is complete at once;
otherwise a first pass over the scores leaves each row's log-sum-exp in the workspace and a second one sums the columns.
Sums stay apart for each of the M rows of a tile until the end: one reduction across threads per tile of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._checks import check_range
from ..ops.select_tokens import RULES
from . import _heuristics, _launch
from ._attend import LOG2E, finite
from ._launch import Launch, divide, power_of_two, vector
from ._prefill import load_rows

EXP, CAUSAL = (tl.constexpr(RULES.index(name)) for name in ("exp", "causal"))


@triton.jit
def score_tile(
    q, key, first, rows, start, j, used, scale, q_row, q_head,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [M, N], in units of log 2, of packed rows from `first` on with keys j; -inf where they do not meet."""
    row = first + tl.arange(0, M)
    i = start + row // G
    x = load_rows(q + i.to(tl.int64) * q_row + (row % G) * q_head, tl.arange(0, key.shape[1]), row < rows, D, True)
    s = tl.dot(x, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
    seen = (row < rows)[:, None] & (j < used)[None, :]
    if RULE == CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def first_row(j, start, G: tl.constexpr, M: tl.constexpr, RULE: tl.constexpr):
    """The packed row, at the beginning of a tile, from which on rows see key j."""
    row = 0
    if RULE == CAUSAL:
        row = tl.maximum(j - start, 0) * G // M * M
    return row


@triton.jit
def row_sums(
    q, k, sums, low, rows, start, used, scale, q_row, q_head, k_row,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, RULE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[row] = log2 sum_j exp2(s) over all keys a row sees."""
    for first in range(0, rows, M):
        row = first + tl.arange(0, M)
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        for j0 in range(low, used, N):
            j = j0 + tl.arange(0, N)
            key = load_rows(k + j.to(tl.int64) * k_row, tl.arange(0, DP), j < used, D, True)
            s = score_tile(q, key, first, rows, start, j, used, scale, q_row, q_head, G, D, M, RULE, PRECISION)
            new = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - finite(new)) + tl.sum(tl.exp2(s - finite(new)[:, None]), 1)
            top = new
        tl.store(sums + row, finite(top) + tl.log2(total), mask=row < rows)


@triton.jit
def choose(weight, index, start, used, tokens, C: tl.constexpr):
    """Writes the rows of start..used with the `tokens` largest weights in ascending order, then -1. A row's rank is the
    number of rows before it: heavier ones, and of the same weight the lower ones."""
    LOWEST: tl.constexpr = -3.4028234663852886e38  # what NaN and -inf rank as: last, before rows that do not rank
    found = 0
    for j0 in range(start, used, C):
        j = j0 + tl.arange(0, C)
        w = tl.load(weight + j, mask=j < used, other=float("-inf"))
        w = tl.where(w > LOWEST, w, LOWEST)
        rank = tl.zeros((C,), tl.int32)
        for other0 in range(start, used, C):
            other = other0 + tl.arange(0, C)
            rival = tl.load(weight + other, mask=other < used, other=float("-inf"))
            rival = tl.where(rival > LOWEST, rival, LOWEST)
            ahead = (rival[None, :] > w[:, None]) | ((rival[None, :] == w[:, None]) & (other[None, :] < j[:, None]))
            rank += tl.sum((ahead & (other < used)[None, :]).to(tl.int32), 1)
        taken = (j < used) & (rank < tokens)
        place = found + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(index + place, j, mask=taken)
        found += tl.sum(taken.to(tl.int32), 0)
    for place0 in range(found, tokens, C):
        place = place0 + tl.arange(0, C)
        tl.store(index + place, place * 0 - 1, mask=place < tokens)


@triton.jit
def select_kernel(
    q, k, length, index, weight, sums, capacity, kv_heads, start, tokens, scale,
    q_n, q_row, q_head, k_n, k_row, k_head,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    q_n, q_row, q_head = q_n * VECTOR, q_row * VECTOR, q_head * VECTOR
    k_n, k_row, k_head = k_n * VECTOR, k_row * VECTOR, k_head * VECTOR
    program = tl.program_id(0).to(tl.int64)
    n, h = program // kv_heads, program % kv_heads
    used = tl.minimum(tl.load(length + n), capacity)
    rows = tl.maximum(used - start, 0) * G
    q += n * q_n + h * G * q_head
    k += n * k_n + h * k_head
    weight += program * capacity
    sums += program * capacity * G
    low = start  # the first key anybody sees
    if RULE == CAUSAL:
        low = 0
    if RULE != EXP and not WHOLE:
        row_sums(q, k, sums, low, rows, start, used, scale, q_row, q_head, k_row, G, D, DP, M, N, RULE, PRECISION)
        tl.debug_barrier()
    for j0 in range(low, used, N):
        j = j0 + tl.arange(0, N)
        key = load_rows(k + j.to(tl.int64) * k_row, tl.arange(0, DP), j < used, D, True)
        share = tl.zeros((M, N), tl.float32)
        top = tl.full((M, N), float("-inf"), tl.float32)
        for first in range(first_row(j0, start, G, M, RULE), rows, M):
            s = score_tile(q, key, first, rows, start, j, used, scale, q_row, q_head, G, D, M, RULE, PRECISION)
            if RULE == EXP:
                new = tl.maximum(top, s)
                share = share * tl.exp2(top - finite(new)) + tl.exp2(s - finite(new))
                top = new
            elif WHOLE:
                p = tl.exp2(s - finite(tl.max(s, 1))[:, None])
                total = tl.sum(p, 1)
                share += p * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
            else:
                row = first + tl.arange(0, M)
                share += tl.exp2(s - finite(tl.load(sums + row, mask=row < rows, other=0.0))[:, None])
        if RULE == EXP:
            highest = tl.max(top, 0)
            w = finite(highest) + tl.log2(tl.sum(share * tl.exp2(top - finite(highest)[None, :]), 0))
        else:
            w = tl.sum(share, 0)
        tl.store(weight + j, w, mask=j < used)
    tl.debug_barrier()
    choose(weight, index + program * tokens, start, used, tokens, 64)


def launch(index: Tensor, q: Tensor, k: Tensor, length: Tensor, tokens: int, start: int, scale: float, rule: str):
    n, rows, kv_heads, dim = k.shape
    group = q.shape[2] // kv_heads
    tile = _heuristics.select_tile(rows if rule == "causal" else rows - start, dim, q.element_size())
    weight = q.new_empty((n, kv_heads, rows), dtype=torch.float32)
    two_passes = rule != "exp" and not tile.whole
    sums = q.new_empty((n, kv_heads, rows * group) if two_passes else 0, dtype=torch.float32)
    args = {"q": q, "k": k, "length": length.contiguous(), "index": index, "weight": weight, "sums": sums}
    args |= {"capacity": rows, "kv_heads": kv_heads, "start": start, "tokens": tokens, "scale": scale}
    args |= dict(zip(("q_n", "q_row", "q_head"), q.stride()[:3], strict=True))
    args |= dict(zip(("k_n", "k_row", "k_head"), k.stride()[:3], strict=True))
    constants = {"G": group, "D": dim, "DP": power_of_two(dim, 16), "M": tile.rows, "N": tile.keys}
    constants |= {"WHOLE": tile.whole, "RULE": RULES.index(rule)}
    constants |= {"PRECISION": "tf32x3" if q.dtype is torch.float32 else "tf32", "VECTOR": vector(q, k)}
    divide(args, constants["VECTOR"], "q_", "k_")
    return Launch(select_kernel, (n * kv_heads,), args, constants, tile.warps, tile.stages,
                  fresh=("index", "weight", "sums"))  # fmt: skip


def call(q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int, scale: float, rule: str) -> Tensor:
    index = _launch.outputs("select_tokens", q, k, length, tokens=tokens, start=start, scale=scale, rule=rule)
    if _launch.checks_values():
        check_range("length", length, 0, q.shape[1])
    if index.numel():
        _launch.run([launch(index, q, k, length, tokens, start, scale, rule)])
    return index
