"""vq_dequantize: one program per tile of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dequantize, _launch


def call(codes: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    out = _launch.outputs("vq_dequantize", codes, coarse, fine, rot, dtype=dtype)
    if out.numel():
        codes = codes.reshape(-1, codes.shape[-1])
        count, width = codes.shape
        # Codes back to back are one head with `count` tokens; otherwise every code is a record of its own.
        tokens = count if codes.stride(0) == width else 1
        strides = (0 if tokens == count else codes.stride(0), 0)
        _launch.run([_dequantize.launch(codes, None, coarse, fine, rot, out, count, 1, tokens, 0, strides)])
    return out
