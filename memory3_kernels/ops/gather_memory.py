"""gather_memory: the chosen rows of k and v, in the layout of a memory record (docs/ops/gather_memory.md).

kv[n, 0, h, j] = k[n, index[n, h, j], h],   kv[n, 1, h, j] = v[n, index[n, h, j], h],   0 where the index is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ._checks import check_range, expect_dtype, expect_floating, expect_shape, expect_unit_stride

SCHEMA = "(Tensor k, Tensor v, Tensor index) -> Tensor"


def _check(k: Tensor, v: Tensor, index: Tensor) -> None:
    expect_shape("k", k, -1, -1, -1, -1)
    expect_floating("k", k)
    expect_shape("v", v, *k.shape)
    expect_dtype("v", v, k.dtype)
    expect_unit_stride("k", k)
    expect_unit_stride("v", v)
    expect_shape("index", index, k.shape[0], k.shape[2], -1)
    expect_dtype("index", index, torch.int32)


def fake(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    _check(k, v, index)
    return k.new_empty((k.shape[0], 2, k.shape[2], index.shape[2], k.shape[3]))


def reference(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    _check(k, v, index)
    n, rows, heads, dim = k.shape
    check_range("index", index, -1, rows - 1)
    valid = (index >= 0)[..., None]
    if rows == 0:
        return (k.sum() + v.sum()) * k.new_zeros((n, 2, heads, index.shape[2], dim))
    at = index.clamp_min(0).long()[..., None].expand(-1, -1, -1, dim)
    picked = [torch.where(valid, x.transpose(1, 2).gather(2, at), 0) for x in (k, v)]
    return torch.stack(picked, 1)


def setup_context(ctx, inputs, output) -> None:
    k, _, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = k.shape[1]


def backward(ctx, grad: Tensor):
    """Adds each row's gradient to the row it came from, in fp32: a row chosen twice by one head counts twice."""
    (index,) = ctx.saved_tensors
    n, _, heads, _, dim = grad.shape
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    # Row 0 of the buffer takes what -1 stands for and is cut off.
    at = (index.long() + 1).unsqueeze(1).unsqueeze(-1).expand(-1, 2, -1, -1, dim)
    total = grad.new_zeros((n, 2, heads, ctx.rows + 1, dim), dtype=wide).scatter_add(3, at, grad.to(wide))
    grad_k, grad_v = total.narrow(3, 1, ctx.rows).to(grad.dtype).transpose(2, 3).unbind(1)
    return grad_k, grad_v, None


def _sample(n, rows, heads, dim, tokens, missing=0.0):
    def make(dtype: torch.dtype, generator: torch.Generator):
        k = torch.randn(n, rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        v = torch.randn(n, rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        index = torch.randint(0, max(rows, 1), (n, heads, tokens), generator=generator, dtype=torch.int32)
        index[torch.rand(index.shape, generator=generator) < missing] = -1
        return (k, v, index), {}

    return make


def cases():
    yield Case("N2_T9_H3_D64_K4", _sample(2, 9, 3, 64, 4), grad=(0, 1))
    yield Case("N3_T7_H2_D24_K8-some-missing", _sample(3, 7, 2, 24, 8, 0.4), grad=(0, 1))
    yield Case("N1_T5_H1_D80_K4-all-missing", _sample(1, 5, 1, 80, 4, 2.0), grad=(0, 1))
    yield Case("N0", _sample(0, 5, 2, 8, 4))
    yield Case("T0", _sample(2, 0, 2, 8, 4, 2.0))
    yield Case("K0", _sample(2, 3, 2, 8, 0))
    yield Case("paper_N8_T128_H8_D80_K8", _sample(8, 128, 8, 80, 8), slow=True, bench=True)


def bad_cases():
    def broken(position: int, value: Tensor):
        def make():
            args = [torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), torch.zeros(2, 3, 5, dtype=torch.int32)]
            args[position] = value
            return tuple(args), {}

        return make

    high = torch.zeros(2, 3, 5, dtype=torch.int32)
    high[1, 2, 3] = 4
    low = torch.zeros(2, 3, 5, dtype=torch.int32)
    low[0, 1, 0] = -2
    yield BadCase("v-shape", broken(1, torch.zeros(2, 4, 3, 16)), r"v: expected shape \[2, 4, 3, 8\], got")
    yield BadCase("v-dtype", broken(1, torch.zeros(2, 4, 3, 8).half()), "v: expected .*[fF]loat")
    yield BadCase("index-shape", broken(2, high[:1]), r"index: expected shape \[2, 3, \*\], got \[1, 3, 5\]")
    yield BadCase("index-dtype", broken(2, high.long()), "index: expected .*[iI]nt")
    yield BadCase("index-high", broken(2, high), r"index\[1, 2, 3\]: expected -1..3, got 4", fake=False)
    yield BadCase("index-low", broken(2, low), r"index\[0, 1, 0\]: expected -1..3, got -2", fake=False)
    yield BadCase("stride", broken(0, torch.zeros(2, 4, 8, 3).mT), "k: expected a last stride of 1, got 3")


def cost(k: Tensor, v: Tensor, index: Tensor) -> Cost:
    return Cost(4 * index.numel() * k.shape[3] * k.element_size() + index.nbytes, 0)


OP = register(
    Op(
        name="gather_memory",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4},
        setup_context=setup_context,
        backward=backward,
    )
)


def gather_memory(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Copies the chosen keys and values of N references into record layout (docs/ops/gather_memory.md).

    Args:
        k, v: [N, T, Hkv, D], equal dtypes (float32, bfloat16, float16; float64 on the reference), last stride 1.
        index: [N, Hkv, K] int32, rows of each head as select_tokens returns them; -1 gives a row of zeros.

    Returns:
        kv [N, 2, Hkv, K, D], contiguous, k's dtype: one layer of N records, keys then values. Differentiable in k and
        v: the backward pass adds each row's gradient, in float32, to the row it was copied from.

    Raises:
        RuntimeError: shapes, dtypes or strides do not match, or an index lies outside -1..T-1.
    """
    return OP(k, v, index)
