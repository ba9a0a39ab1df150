"""Argument checks shared by the ops; the native binding and launchers raise the same messages.

Shape and dtype checks run under fake tensors too; value checks read index tensors, so only references call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """-1 accepts any size."""
    good = tensor.dim() == len(shape) and all(
        isinstance(w, int) and w == -1 or n == w for n, w in zip(tensor.shape, shape, strict=True)
    )
    torch._check(
        good,
        lambda: (
            f"{name}: expected shape [{', '.join('*' if isinstance(n, int) and n < 0 else str(n) for n in shape)}]"
            f", got {list(tensor.shape)}"
        ),
    )


def expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    torch._check(tensor.dtype == dtype, lambda: f"{name}: expected {dtype}, got {tensor.dtype}")


def expect_floating(name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in KV_DTYPES, lambda: f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}"
    )


def expect_unit_stride(name: str, tensor: Tensor) -> None:
    good = tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    torch._check(good, lambda: f"{name}: expected a last stride of 1, got {tensor.stride(-1)}")


def expect_head_dim(name: str, dim: int) -> None:
    torch._check(
        dim >= 8 and dim % 8 == 0,
        lambda: f"{name}: expected a head dimension that is a multiple of 8, got {dim}",
    )


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Every element within low..high, both included.

    Raises:
        RuntimeError: naming the first element outside, in memory order, and its value.
    """
    bad = (values < low) | (values > high)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        place = ", ".join(map(str, where))
        raise RuntimeError(f"{name}[{place}]: expected {low}..{high}, got {int(values[tuple(where)])}")
