"""The parts of a decoder block: linear maps (packed for CPU inference), RMSNorm, and the block itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory3_kernels import PackedWeight, native_reason, pack_weight, packed_linear, pages
from memory3_kernels.packed import BLOCK

from ..config import ModelConfig
from ..profiling import span


class Linear(nn.Module):
    """x [..., in] -> [..., out], no bias.

    `packed` holds a low-bit weight in place of the dense one (`weight` is None then): inference only.

    Without gradients on a CPU a dense weight is multiplied from a packed copy, made at first use and remade when the
    weight was changed in place: in bf16 packed_linear's layout, in fp32 oneDNN's. F.linear would reorder a bf16 weight
    at every call.
    """

    def __init__(self, in_features: int, out_features: int, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features)) if weight is None else weight
        self.packed: PackedWeight | None = None
        self._packed: PackedWeight | Tensor | None = None
        self._packed_from: tuple[int, int] | None = None

    def _apply(self, fn, recurse=True):  # noqa: ANN001 - signature of nn.Module
        self._packed = self._packed_from = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # Copies and pickles go without the packed copy: it is remade at first use (oneDNN's has no storage).
        return {**self.__dict__, "_packed": None, "_packed_from": None}

    def forward(self, x: Tensor) -> Tensor:
        with span("linear"):
            return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError("low-bit weights have no gradient: load the model with weights='dense' to train it")
            return packed_linear(x, self.packed)
        weight = self.weight
        trains = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if trains or weight.device.type != "cpu" or not x.numel():
            return F.linear(x, weight)
        if weight.dtype is torch.bfloat16 and weight.shape[1] % BLOCK == 0 and native_reason() is None:
            return packed_linear(x, self.inference_weight())
        if _CAN_PACK and weight.dtype in (torch.bfloat16, torch.float32):
            packed = self._copy(lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1))
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return F.linear(x, weight)

    def inference_weight(self) -> PackedWeight:
        """The packed weight: the low-bit one, or a copy of the dense one in bf16."""
        return self.packed if self.packed is not None else self._copy(lambda: resident(pack_weight(self.weight)))

    def keep(self, weight: PackedWeight) -> None:
        """Replaces what inference_weight() gave by the same, elsewhere in memory."""
        if self.packed is not None:
            self.packed = weight
        else:
            self._packed = weight

    def _copy(self, make: Callable[[], Tensor | PackedWeight]):
        version = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self._packed_from != version:
            self._packed, self._packed_from = make(), version
        return self._packed


def resident(weight: PackedWeight) -> PackedWeight:
    """The same packed weight on huge pages, for weights that are read at every token."""
    data = pages.zeros(weight.data.shape, weight.data.dtype)
    return weight._replace(data=data.copy_(weight.data))


def _can_pack() -> bool:
    """Whether the (private) oneDNN ops that torch's own compiler uses are there and work."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            x, w = torch.ones(1, 32, dtype=torch.bfloat16), torch.ones(32, 32, dtype=torch.bfloat16)
            packed = torch.ops.mkldnn._reorder_linear_weight(w, 1)
            out = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return bool((out == 32).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


_CAN_PACK = _can_pack()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 inside and rounded once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    """One decoder layer in two halves, with attention left to the caller between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.n_heads + 2 * config.n_kv_heads
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.qkv = Linear(config.dim, self.heads * config.head_dim)
        self.out = Linear(config.n_heads * config.head_dim, config.dim)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def project(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, Hq + 2 Hkv, D]: query heads, key heads, value heads, before RoPE."""
        return self.qkv(self.attn_norm(x)).view(x.shape[0], self.heads, self.head_dim)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [T, dim] and attention output [T, Hq, D] -> the layer's output [T, dim]."""
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)
