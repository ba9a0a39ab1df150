"""gather_dequantize: one program per tile of vectors of the result, records found through `slots`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import check_range
from . import _dequantize, _launch


def call(codes: Tensor, slots: Tensor, coarse: Tensor, fine: Tensor, rot: Tensor | None, *, tokens: int,
         dtype: torch.dtype) -> Tensor:  # fmt: skip
    out = _launch.outputs("gather_dequantize", codes, slots, coarse, fine, rot, tokens=tokens, dtype=dtype)
    if _launch.checks_values():
        check_range("slots", slots, -1, codes.shape[0] - 1)
    if out.numel():
        vectors = out.numel() // out.shape[3]
        launch = _dequantize.launch(codes, slots.contiguous(), coarse, fine, rot, out, vectors, codes.shape[1], tokens,
                                    codes.shape[0], codes.stride()[:2])  # fmt: skip
        _launch.run([launch])
    return out
