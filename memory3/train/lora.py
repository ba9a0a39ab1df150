"""Low-rank adapters by peft: put on, saved in peft's own format, put back and merged.

FOLDER/adapter_model.safetensors   A and B of every adapted linear map
      /adapter_config.json         rank, alpha, targets (LoRA), and what they were trained on
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.layers import Linear
from ..model.llama import Llama
from .config import LoRA

WEIGHTS, ABOUT = "adapter_model.safetensors", "adapter_config.json"
_ADAPTER = "default"


def add_lora(net: Llama, lora: LoRA) -> Llama:
    """Freeze `net` and put fp32 A and B beside the linear maps that `lora` names; in place.

    Raises ImportError with the command that installs peft, ValueError for low-bit weights.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"LoRA needs peft; run: pip install 'memory3[train]' ({error})") from None
    for block in net.blocks:
        for name in lora.targets:
            ours: Linear = getattr(block, name)
            if ours.weight is None:
                raise ValueError("low-bit weights cannot be adapted; load the model with weights='dense'")
            setattr(block, name, _plain(ours.weight))  # peft knows torch's own linear layer
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    inject_adapter_in_model(config, net, adapter_name=_ADAPTER)
    net.folding = Folding(net, lora)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(net.embed.device, torch.float32)
    return net


class Folding:
    """Sums of base weights and updates, W + alpha / rank * B A, of all layers at once.

    Beside every linear map peft adds half a dozen small operations, each launched by itself; folded, there is one
    product per kind of map. That costs a weight gradient of the full matrices, so it pays on a GPU, where a step of
    short sequences waits for launches.
    """

    def __init__(self, net: Llama, lora: LoRA) -> None:
        self.scale = lora.alpha / lora.rank
        self.adapted = {name: [getattr(block, name) for block in net.blocks] for name in lora.targets}
        self.bare = {name: [layer.base_layer for layer in layers] for name, layers in self.adapted.items()}
        self.folded = {name: [_Folded() for _ in layers] for name, layers in self.adapted.items()}
        self._base: dict[str, Tensor] = {}

    def fold(self) -> None:
        """Give the folded maps their weights: in the dtype of the base, differentiable in A and B."""
        for name, layers in self.adapted.items():
            if name not in self._base:
                self._base[name] = torch.stack([layer.base_layer.weight.detach() for layer in layers])
            base = self._base[name]
            a = torch.stack([layer.lora_A[_ADAPTER].weight for layer in layers]).to(base.dtype)
            b = torch.stack([layer.lora_B[_ADAPTER].weight for layer in layers]).to(base.dtype)
            summed = torch.baddbmm(base, b, a, alpha=self.scale)
            for folded, weight in zip(self.folded[name], summed.unbind(0), strict=True):
                folded.weight = weight

    def forget(self) -> None:
        """Let go of the weights, and of what their gradient needs."""
        for folded in (f for layers in self.folded.values() for f in layers):
            folded.weight = None


class _Folded(nn.Module):
    """A linear map with a weight that something else computed."""

    weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@contextmanager
def computing(net: Llama, fold: bool | None = None) -> Iterator[None]:
    """A block in which an adapted net computes with folded weights (fold None: on a GPU, unless layers are recomputed).

    Folded weights are in the dtype of the base, and nothing needs autocast then.
    """
    folding: Folding | None = getattr(net, "folding", None)
    if fold is None:
        fold = net.embed.device.type != "cpu" and not net.checkpointing
    if folding is None or not fold:
        yield
        return
    with torch.autocast(net.embed.device.type, enabled=False):
        folding.fold()
        try:
            with _instead(net, folding.folded):
                yield
        finally:
            folding.forget()


@contextmanager
def base_weights(net: Llama) -> Iterator[None]:
    """A block in which an adapted net computes as it did before. Raises ValueError for a net without an adapter."""
    if getattr(net, "folding", None) is None:
        raise ValueError("held sequences need the base weights beside the trained ones: train an adapter (lora)")
    with _instead(net, net.folding.bare):
        yield


@contextmanager
def _instead(net: Llama, layers: dict[str, list[nn.Module]]) -> Iterator[None]:
    before = {name: [getattr(block, name) for block in net.blocks] for name in layers}
    try:
        _put(net, layers)
        yield
    finally:
        _put(net, before)


def _put(net: Llama, layers: dict[str, list[nn.Module]]) -> None:
    for name, modules in layers.items():
        for block, module in zip(net.blocks, modules, strict=True):
            setattr(block, name, module)


def lora_state(net: Llama) -> dict[str, Tensor]:
    """A [rank, in] and B [out, rank] by "blocks.0.qkv.lora_A" and so on, fp32."""
    found = {}
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            found[name.replace(f".{_ADAPTER}.weight", "")] = parameter.detach().float().contiguous()
    return found


def save_adapter(
    folder: Path, state: dict[str, Tensor], lora: LoRA, about: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write an adapter; `about` (JSON values) says what it is of. Stored in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.to(dtype).contiguous() for n, t in state.items()}, folder / WEIGHTS)
    text = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), **about}
    (folder / ABOUT).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the configuration beside them. Raises FileNotFoundError naming what is missing."""
    for file in (WEIGHTS, ABOUT):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}; give a folder that `memory3 train` wrote an adapter into")
    return load_file(folder / WEIGHTS), json.loads((folder / ABOUT).read_text(encoding="utf-8"))


@torch.no_grad()
def merge(net: Llama, state: dict[str, Tensor], scale: float) -> Llama:
    """Add scale * B A to the dense weights of `net`, in place. Raises ValueError when they are of another model."""
    pairs = {n[: -len(".lora_A")]: t for n, t in state.items() if n.endswith(".lora_A")}
    for name, a in pairs.items():
        b = state[f"{name}.lora_B"]
        weight = dict(net.named_parameters()).get(f"{name}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            have = None if weight is None else tuple(weight.shape)
            raise ValueError(f"adapter {name}: [{b.shape[0]}, {a.shape[1]}] does not fit the model's weight {have}")
        weight.copy_((weight.float() + scale * (b.float() @ a.float()).to(weight.device)).to(weight.dtype))
    return net


def _plain(weight: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    return linear
