"""merge_attention_states: one program per block of (row, head) pairs; both sides are read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import Launch, power_of_two


@triton.jit
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, pairs, heads,
    a_row, a_head, a_dim, b_row, b_head, b_dim, la_row, la_head, lb_row, lb_head,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row, head = pair // heads, pair % heads
    a = tl.load(lse_a + row * la_row + head * la_head, mask=inside, other=float("-inf"))
    b = tl.load(lse_b + row * lb_row + head * lb_head, mask=inside, other=float("-inf"))
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(a - safe), tl.exp(b - safe)
    total = weight_a + weight_b
    divisor = tl.where(total > 0, total, 1.0)
    weight_a, weight_b = weight_a / divisor, weight_b / divisor
    d = tl.arange(0, DP)
    within = inside[:, None] & (d < D)[None, :]
    # A side that saw nothing may hold anything, NaN included: it is not read.
    x = tl.load(
        out_a + (row * a_row + head * a_head)[:, None] + d[None, :] * a_dim,
        mask=within & (weight_a > 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    y = tl.load(
        out_b + (row * b_row + head * b_head)[:, None] + d[None, :] * b_dim,
        mask=within & (weight_b > 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    merged = weight_a[:, None] * x + weight_b[:, None] * y
    tl.store(out + pair[:, None] * D + d[None, :], merged.to(out.dtype.element_ty), mask=within)
    tl.store(lse + pair, tl.where(total > 0, top + tl.log(divisor), float("-inf")), mask=inside)


def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _launch.outputs("merge_attention_states", out_a, lse_a, out_b, lse_b)
    rows, heads, dim = out.shape
    args = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out, "lse": lse}
    args |= {"pairs": rows * heads, "heads": heads}
    args |= dict(zip(("a_row", "a_head", "a_dim"), out_a.stride(), strict=True))
    args |= dict(zip(("b_row", "b_head", "b_dim"), out_b.stride(), strict=True))
    args |= dict(zip(("la_row", "la_head"), lse_a.stride(), strict=True))
    args |= dict(zip(("lb_row", "lb_head"), lse_b.stride(), strict=True))
    width = power_of_two(dim)
    block = max(1, min(64, 2048 // width))  # 16 values of each side per thread: two 16-byte loads in flight
    if out.numel() or lse.numel():
        constants = {"D": dim, "DP": width, "BLOCK": block}
        _launch.run([Launch(merge_kernel, (triton.cdiv(rows * heads, block),), args, constants, fresh=("out", "lse"))])
    return out, lse
