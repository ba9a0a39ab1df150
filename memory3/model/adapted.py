"""A checkpoint with a low-rank adapter added to its weights (memory3.train.lora), as one more kind of checkpoint.

An adapter that was trained with "frozen" memories changes how they are read, not how they are written: the checkpoint
itself goes on writing, so its banks serve with and without the adapter. One trained with "live" ones writes them too.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

from torch import Tensor

from ..config import MemoryConfig, ModelConfig
from ..identity import combine_hashes, hash_files
from ..train.lora import WEIGHTS, read_adapter
from .tokenizer import Tokenizer

SHIPPED = "shipped"
_NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "out", "gate": "gate_up", "up": "gate_up", "down": "down"}


def adapter_folder(adapter: str | Path, source: str | Path) -> Path:
    """The folder itself; for "shipped" the adapter that comes with the preset `source`.

    Raises FileNotFoundError where that preset has none.
    """
    if str(adapter) != SHIPPED:
        return Path(adapter)
    folder = Path(str(resources.files("memory3"))) / "adapters" / str(source)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no adapter comes with {str(source)!r}; give the folder of one, or None")
    return folder


class Adapted:
    """Reads `base` with the adapter of `folder` added: weights of adapted maps are dense, W + alpha / rank * B A.

    Raises FileNotFoundError without an adapter there, ValueError when it belongs to another checkpoint.
    """

    def __init__(self, base, folder: Path) -> None:
        self.base = base
        self._state, self.about = read_adapter(folder)
        if self.about.get("base_hash") not in (None, base.hash()):
            raise ValueError(
                f"{folder} adapts the checkpoint {self.about['base_hash']}, this one is {base.hash()}; "
                "load the checkpoint that it was trained on"
            )
        self.folder = folder

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def writes(self) -> bool:
        """Whether memories are written with the adapter too."""
        return self.about.get("write") == "live"

    def memory(self, preset: MemoryConfig) -> MemoryConfig:
        """The memory configuration it was trained with."""
        known = {f.name for f in fields(MemoryConfig)}
        return replace(preset, **{k: v for k, v in self.about.get("memory", {}).items() if k in known})

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def hash(self) -> str:
        """Of the weights that write memories: a bank is bound to those."""
        if not self.writes:
            return self.base.hash()
        return combine_hashes(self.base.hash(), hash_files([self.folder / WEIGHTS]))

    def blocks(self, name: str) -> tuple[Tensor, str] | None:
        """None for what is adapted: low-bit blocks cannot take an update."""
        return None if self._of(name) else self.base.blocks(name)

    def tensor(self, name: str) -> Tensor:
        weight, found = self.base.tensor(name), self._of(name)
        if found is None:
            return weight
        a, b = found
        scale = self.about["alpha"] / self.about["rank"]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(f"adapter of {name}: [{b.shape[0]}, {a.shape[1]}] does not fit {tuple(weight.shape)}")
        return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)

    def _of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [rank, in] and the rows of B [out, rank] that belong to a tensor by its Hugging Face name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        layer, part = match.groups()
        at = f"blocks.{layer}.{_FUSED[part]}.lora_"
        if at + "A" not in self._state:
            return None
        b, config = self._state[at + "B"], self.base.config
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        sizes = {"qkv": [q, kv, kv], "gate_up": [config.ffn_dim] * 2}.get(_FUSED[part], [b.shape[0]])
        order = {"q": 0, "k": 1, "v": 2, "up": 1}.get(part, 0)
        if sum(sizes) != b.shape[0]:
            raise ValueError(f"adapter {at}B: expected {sum(sizes)} rows, got {b.shape[0]}")
        return self._state[at + "A"], b.split(sizes)[order]
