"""Low-rank adapters by peft: put on, saved in peft's own format, put back and merged.

FOLDER/adapter_model.safetensors   A and B of every adapted linear map
      /adapter_config.json         rank, alpha, targets (LoRA), and what they were trained on
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return net


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
