"""An int8 linear map in plain torch, as its quantisation libraries do: what int8_linear is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memory3_kernels.int8 import dequantise_weight

from .peer import Peer


def dynamic_int_mm(x: Tensor, weight: Tensor, *, rows: int, gelu: bool, out_dtype: torch.dtype) -> Peer:
    """Activations quantised per token, symmetric; torch._int_mm; scales, bias and GELU on its sums.

    Raises:
        ValueError: what torch._int_mm does not take: fewer than 17 rows of x, sizes that are no multiple of 8.
    """
    cols = x.shape[-1]
    if x.dim() != 2 or len(x) < 17 or rows % 8 or cols % 8 or not rows or not cols:
        raise ValueError("dynamic_int_mm: expected x [more than 16, cols], cols and rows multiples of 8")
    values, scale, bias = dequantise_weight(weight, rows, cols)
    columns = values.to(torch.int8).T

    def call() -> Tensor:
        width = x.abs().amax(-1, keepdim=True).float() / 127
        sums = torch._int_mm((x / width).round_().to(torch.int8), columns)
        out = (sums * width).mul_(scale).add_(bias)
        return (F.gelu(out) if gelu else out).to(out_dtype)

    return Peer(call, lambda out: out, (x, columns))
