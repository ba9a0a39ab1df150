"""merge_attention_states: attention over two disjoint key sets becomes attention over their union.

With m = max(lse_a, lse_b), w_a = exp(lse_a - m), w_b = exp(lse_b - m):
    out = (w_a out_a + w_b out_b) / (w_a + w_b),   lse = m + log(w_a + w_b).
Online-softmax identity (Milakov and Gimelshein, arXiv 1805.02867); used to join splits of a long context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register

SCHEMA = "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    torch._check(out_a.dim() == 3, lambda: f"out_a: expected shape [T, H, D], got {list(out_a.shape)}")
    torch._check(
        out_b.shape == out_a.shape,
        lambda: f"out_b: expected shape {list(out_a.shape)}, got {list(out_b.shape)}",
    )
    torch._check(out_b.dtype == out_a.dtype, lambda: f"out_b: expected {out_a.dtype}, got {out_b.dtype}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        torch._check(
            lse.shape == out_a.shape[:2],
            lambda name=name, lse=lse: f"{name}: expected shape {list(out_a.shape[:2])}, got {list(lse.shape)}",
        )
        wanted = torch.float64 if out_a.dtype is torch.float64 else torch.float32
        torch._check(
            lse.dtype == wanted, lambda name=name, lse=lse, wanted=wanted: f"{name}: expected {wanted}, got {lse.dtype}"
        )


def fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check(out_a, lse_a, out_b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    seen = lse > -torch.inf
    safe = torch.where(seen, lse, 0)
    merged = torch.zeros_like(out_a, dtype=lse.dtype)
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part - safe).unsqueeze(-1)
        # A side that saw nothing has weight 0 and may hold anything, NaN included.
        merged = merged + torch.where(weight > 0, weight * out.to(lse.dtype), 0)
    return merged.to(out_a.dtype), lse


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
    safe = torch.where(lse > -torch.inf, lse, 0)
    grads = []
    for part_out, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part_lse - safe)
        delta = (grad_out.to(lse.dtype) * (part_out.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        grads.append((weight.unsqueeze(-1) * grad_out.to(lse.dtype)).to(out.dtype))
        grads.append(torch.where(weight > 0, weight * (delta + grad_lse), 0))
    return tuple(grads)


def _sample(tokens: int, heads: int, dim: int, empty: bool = False):
    def make(dtype: torch.dtype, generator: torch.Generator):
        wide = torch.float64 if dtype is torch.float64 else torch.float32

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=wide)

        out_a, out_b = randn(tokens, heads, dim).to(dtype), randn(tokens, heads, dim).to(dtype)
        lse_a, lse_b = 3 * randn(tokens, heads), 3 * randn(tokens, heads)
        if empty:  # a side that saw nothing, then neither side; what it holds must not leak
            lse_a[0], out_a[0] = -torch.inf, torch.nan
            lse_a[1], lse_b[1], out_a[1], out_b[1] = -torch.inf, -torch.inf, torch.nan, torch.nan
        return (out_a, lse_a, out_b, lse_b), {}

    return make


def cases():
    yield Case("T5_H3_D64", _sample(5, 3, 64), grad=(0, 1, 2, 3))
    yield Case("T2_H2_D8-tail", _sample(2, 2, 24), grad=(0, 1, 2, 3))
    yield Case("T3_H2_D80-empty-sides", _sample(3, 2, 80, empty=True))
    yield Case("T0", _sample(0, 3, 64))
    yield Case("T256_H40_D80", _sample(256, 40, 80), bench=True)


def bad_cases():
    def broken(position: int, value: Tensor):
        def make():
            args = [torch.zeros(2, 3, 8), torch.zeros(2, 3), torch.zeros(2, 3, 8), torch.zeros(2, 3)]
            args[position] = value
            return tuple(args), {}

        return make

    yield BadCase(
        "out_b-shape", broken(2, torch.zeros(2, 3, 16)), r"out_b: expected shape \[2, 3, 8\], got \[2, 3, 16\]"
    )
    yield BadCase("lse_a-shape", broken(1, torch.zeros(3, 2)), r"lse_a: expected shape \[2, 3\], got \[3, 2\]")
    yield BadCase("lse_b-dtype", broken(3, torch.zeros(2, 3, dtype=torch.bfloat16)), "lse_b: expected .*[fF]loat")


def cost(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Cost:
    return Cost(3 * out_a.nbytes + 3 * lse_a.nbytes, 3 * out_a.numel())


OP = register(
    Op(
        name="merge_attention_states",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        setup_context=setup_context,
        backward=backward,
    )
)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two attention results over disjoint key sets (arXiv 1805.02867; docs/ops/merge_attention_states.md).

    Args:
        out_a, out_b: [T, H, D], float32, bfloat16 or float16 (float64 on the reference); equal dtypes.
        lse_a, lse_b: [T, H] float32, natural log of the softmax denominators; -inf where a side saw nothing, whose
            rows are then not read.

    Returns:
        out [T, H, D] in the inputs' dtype (0 where neither side saw anything) and lse [T, H] float32.

    Raises:
        RuntimeError: shapes or dtypes do not match.
    """
    return OP(out_a, lse_a, out_b, lse_b)
