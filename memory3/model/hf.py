"""Llama-architecture checkpoints in Hugging Face folders: config.json, safetensors (one file or sharded)."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import MemoryConfig, ModelConfig
from ..identity import hash_files
from .tokenizer import Tokenizer

MEMORY_FILE = "memory3.json"


class HFCheckpoint:
    """One folder. Tensors come in the dtype in which they are stored.

    Raises FileNotFoundError or ValueError naming what is missing or not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{self.path} has no config.json; give a folder saved with save_pretrained")
        self._raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        names = self._raw.get("architectures") or [self._raw.get("model_type")]
        if not any(n in ("LlamaForCausalLM", "llama") for n in names):
            raise ValueError(f"{self.path} has architecture {names}; only LlamaForCausalLM is supported")
        for key in ("attention_bias", "mlp_bias"):
            if self._raw.get(key):
                raise ValueError(f"{self.path} has {key}=true; biases are not supported")
        if self._raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"{self.path} has hidden_act={self._raw['hidden_act']!r}; only 'silu' is supported")
        self._files: dict[str, Any] = {}

    @cached_property
    def _where(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.path / file for name, file in weight_map.items()}
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise FileNotFoundError(
                f"{self.path} has neither model.safetensors nor model.safetensors.index.json; convert other weight "
                "formats with save_pretrained(folder, safe_serialization=True)"
            )
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, path: Path) -> Any:
        from safetensors import safe_open

        key = str(path)
        if key not in self._files:
            self._files[key] = safe_open(key, framework="pt")
        return self._files[key]

    def hash(self) -> str:
        """SHA-256 over config.json and all weight files."""
        return hash_files([self.path / "config.json", *set(self._where.values())])

    @cached_property
    def config(self) -> ModelConfig:
        raw = self._raw
        heads = raw["num_attention_heads"]
        # transformers 5 writes rope_parameters; before that rope_theta and rope_scaling stood apart.
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        base = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            dim=raw["hidden_size"],
            n_layers=raw["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn_dim=raw["intermediate_size"],
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_base=float(base),
            rope_scaling=None if kind == "default" else rope,
            max_context=raw.get("max_position_embeddings", 2048),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )

    def memory(self) -> MemoryConfig | None:
        """The memory configuration in memory3.json, which training leaves beside its weights; None without one."""
        file = self.path / MEMORY_FILE
        return MemoryConfig(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def tensor(self, name: str) -> Tensor:
        """Tensor by its Hugging Face name. Raises KeyError naming what is missing."""
        if name not in self._where:
            raise KeyError(f"{self.path} has no tensor {name}")
        path = self._where[name]
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} lacks the shard {path.name}, which holds {name}")
        return self._open(path).get_tensor(name)

    def blocks(self, name: str) -> None:
        """None: safetensors folders hold dense weights."""

    def tokenizer(self) -> Tokenizer:
        """From tokenizer.json and its companions."""
        return Tokenizer.from_folder(self.path)
