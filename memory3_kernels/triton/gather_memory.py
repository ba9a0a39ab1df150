"""gather_memory: a copy; one program per side, head and block of chosen rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops._checks import check_range
from . import _launch
from ._launch import Launch, power_of_two


@triton.jit
def gather_rows_kernel(
    k, v, index, out, rows, heads, tokens, blocks,
    k_n, k_row, k_head, v_n, v_row, v_head, i_n, i_head, i_token,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    n = (tl.program_id(0) // blocks // heads).to(tl.int64)
    side = tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    row = tl.load(index + n * i_n + head * i_head + j * i_token, mask=j < tokens, other=-1)
    taken = ((row >= 0) & (row < rows))[:, None] & (d < D)[None, :]
    place = row.to(tl.int64)
    if side == 0:
        x = tl.load(k + n * k_n + head * k_head + place[:, None] * k_row + d[None, :], mask=taken, other=0)
    else:
        x = tl.load(v + n * v_n + head * v_head + place[:, None] * v_row + d[None, :], mask=taken, other=0)
    start = ((n * 2 + side) * heads + head) * tokens
    tl.store(out + (start + j)[:, None] * D + d[None, :], x, mask=(j < tokens)[:, None] & (d < D)[None, :])


def call(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    out = _launch.outputs("gather_memory", k, v, index)
    n, rows, heads, dim = k.shape
    tokens = index.shape[2]
    if _launch.checks_values():
        check_range("index", index, -1, rows - 1)
    if out.numel() == 0:
        return out
    width = power_of_two(dim)
    # A row of 80 or 128 values is 10 to 16 loads of 16 bytes: 1024 values keep 128 threads busy with one each.
    block = min(power_of_two(tokens), max(1, 1024 // width))
    blocks = triton.cdiv(tokens, block)
    args = {"k": k, "v": v, "index": index, "out": out}
    args |= {"rows": rows, "heads": heads, "tokens": tokens, "blocks": blocks}
    args |= dict(zip(("k_n", "k_row", "k_head"), k.stride()[:3], strict=True))
    args |= dict(zip(("v_n", "v_row", "v_head"), v.stride()[:3], strict=True))
    args |= dict(zip(("i_n", "i_head", "i_token"), index.stride(), strict=True))
    constants = {"D": dim, "DP": width, "BLOCK": block}
    warps = max(1, min(4, block * width // 256))  # 8 values, 16 bytes in half precision, per thread
    _launch.run([Launch(gather_rows_kernel, (blocks * heads * n, 2), args, constants, num_warps=warps, fresh=("out",))])
    return out
