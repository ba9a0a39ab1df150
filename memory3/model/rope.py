"""Rotary position embedding: frequencies, tables, rotation by position or by a shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [D/2] radians per position, after `rope_scaling` ("linear", or "llama3" as in Llama 3.1)."""
    lanes = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    exponent = lanes.float() / config.head_dim
    inv = 1.0 / (config.rope_base**exponent)
    scaling = config.rope_scaling or {}
    if config.rope_type == "linear":
        return inv / float(scaling["factor"])
    if config.rope_type != "llama3":
        return inv
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv / factor + blend * inv


class Rope:
    """Tables cos, sin [max_context, D] per dtype and device, computed in fp32 and rounded, built at first use.

    Layout: lane i pairs with lane i + D/2 (as Hugging Face Llama); `sin` already carries the sign, so that
    x * cos + swap_halves(x) * sin rotates.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.max_positions = config.max_context
        self.half = config.head_dim // 2
        self._inv = inverse_frequencies(config)
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def _table(self, positions: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        angle = positions.float()[:, None] * self._inv
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.to(device, dtype), sin.to(device, dtype)

    def table(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [max_context, D]."""
        key = (dtype, device)
        if key not in self._tables:
            with torch.inference_mode(False):  # the tables also serve training, which refuses inference tensors
                everywhere = torch.arange(self.max_positions, device="cpu")
                self._tables[key] = self._table(everywhere, dtype, device)
        return self._tables[key]

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [T, 1, D] at int64 positions [T], all below max_context."""
        cos, sin = self.table(dtype, positions.device)
        return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H, D] rotated; cos, sin [T, 1, D] of x's dtype."""
        cos, sin = cos_sin
        return torch.addcmul(x * cos, x.roll(self.half, -1), sin)

    def shift(self, keys: Tensor, by: int) -> Tensor:
        """Rotated keys [..., D] moved by `by` positions (may be negative): R(p + by) k = R(by) R(p) k. fp32 inside."""
        cos, sin = self._table(torch.tensor([by], device="cpu"), torch.float32, keys.device)
        x = keys.float()
        return torch.addcmul(x * cos[0], x.roll(self.half, -1), sin[0]).to(keys.dtype)
