"""What the linear maps on tiles of 16 rows check and cost alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import Cost
from ..packed import TILE

OUT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def columns(x: Tensor) -> int:
    torch._check(x.dim() > 0, lambda: "x: expected [..., cols], got a number")
    return x.shape[-1]


def check_weight(weight: Tensor, rows: int, cols: int, tile_bytes: int, out_dtype: torch.dtype, kind: str = "") -> None:
    """kind: what a message says behind the shape."""
    torch._check(weight.dtype is torch.uint8, lambda: f"weight: expected uint8 (Byte), got {weight.dtype}")
    torch._check(rows >= 0, lambda: f"rows: expected 0 or more, got {rows}")
    want = (-(-rows // TILE), tile_bytes)
    torch._check(
        weight.dim() == 2 and weight.shape[0] == want[0] and weight.shape[1] == want[1],
        lambda: f"weight: expected shape {list(want)} for {rows} rows of {cols}{kind}, got {list(weight.shape)}",
    )
    torch._check(out_dtype in OUT, lambda: f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")


def cost(x: Tensor, weight: Tensor, *, rows: int, out_dtype: torch.dtype, **_: object) -> Cost:
    count = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return Cost(x.nbytes + weight.nbytes + count * rows * out_dtype.itemsize, 2 * x.numel() * rows)
