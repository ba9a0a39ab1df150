"""Llama-architecture checkpoints in GGUF files: configuration, weights, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from ..config import ModelConfig
from ..identity import hash_file
from .tokenizer import Tokenizer

_TOKEN_CONTROL, _TOKEN_USER = 3, 4
_BLOCK_FORMATS = ("q8_0", "q4_1", "q4_0")

# Pre-tokenizers whose splitting is exactly GPT-2's ByteLevel regex. SmolLM additionally isolates digits, which its
# merges already imply (no merge holds a digit), so ids are the same.
_BYTE_LEVEL = ("default", "gpt-2", "gpt2", "smollm")

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's pair interleaving of q/k rows: [H * D, in] with lanes (0, D/2, 1, ...) -> (0, 1, ..., D-1)."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


class GGUFCheckpoint:
    """One GGUF file. Tensors are asked for by their Hugging Face names and come dequantised, fp32.

    Raises ValueError for an architecture or tokenizer that this decoder does not have.
    """

    def __init__(self, path: str | Path) -> None:
        from gguf import GGUFReader

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file at {self.path}")
        try:
            self._reader = GGUFReader(str(self.path))
        except (ValueError, IndexError, OSError) as error:
            raise ValueError(f"{self.path} is not a readable GGUF file: {error}") from error
        self._tensors = {t.name: t for t in self._reader.tensors}
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path} has architecture {architecture!r}; only 'llama' is supported")

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def hash(self) -> str:
        """SHA-256 of the file."""
        return hash_file(self.path)

    @cached_property
    def config(self) -> ModelConfig:
        get = self._value
        dim, heads = int(get("llama.embedding_length")), int(get("llama.attention.head_count"))
        head_dim = int(get("llama.attention.key_length", dim // heads))
        scaling = None
        kind = get("llama.rope.scaling.type")
        if kind == "linear":
            scaling = {"rope_type": "linear", "factor": float(get("llama.rope.scaling.factor"))}
        elif kind not in (None, "none"):
            raise ValueError(f"{self.path} has RoPE scaling {kind!r}; supported in GGUF: none, linear")
        if "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path} holds precomputed RoPE factors (Llama 3.1 and later); use the safetensors folder, whose "
                "config states them"
            )
        if int(get("llama.rope.dimension_count", head_dim)) != head_dim:
            raise ValueError(f"{self.path} rotates only a part of each head, which is not supported")
        if int(get("llama.expert_count", 0)):
            raise ValueError(f"{self.path} is a mixture of experts, which is not supported")
        return ModelConfig(
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            dim=dim,
            n_layers=int(get("llama.block_count")),
            n_heads=heads,
            n_kv_heads=int(get("llama.attention.head_count_kv", heads)),
            head_dim=head_dim,
            ffn_dim=int(get("llama.feed_forward_length")),
            # Stored as fp32: 9.999999747e-06 is 1e-5.
            norm_eps=float(f"{float(get('llama.attention.layer_norm_rms_epsilon')):.6g}"),
            rope_base=float(get("llama.rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            max_context=int(get("llama.context_length")),
            tied="output.weight" not in self._tensors,
        )

    def tensor(self, name: str) -> Tensor:
        """fp32 tensor by Hugging Face name, q and k un-permuted. Raises KeyError naming what is missing."""
        from gguf.quants import dequantize

        key = _gguf_name(name)
        if key not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {key} ({name})")
        stored = self._tensors[key]
        return self._ordered(name, torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()))

    def blocks(self, name: str) -> tuple[Tensor, str] | None:
        """A quantised matrix as it lies in the file, rows of blocks uint8 [rows, bytes], and its format, for
        `memory3_kernels.pack_blocks`; None for other tensors. q and k rows un-permuted.
        """
        stored = self._tensors.get(_gguf_name(name))
        kind = None if stored is None else stored.tensor_type.name.lower()
        if kind not in _BLOCK_FORMATS:
            return None
        return self._ordered(name, torch.from_numpy(stored.data.copy())), kind

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        if name.endswith("q_proj.weight"):
            return unpermute(rows, self.config.n_heads)
        if name.endswith("k_proj.weight"):
            return unpermute(rows, self.config.n_kv_heads)
        return rows

    def names(self) -> Iterator[str]:
        """GGUF names of all tensors."""
        return iter(self._tensors)

    def tokenizer(self) -> Tokenizer:
        """A byte-level BPE tokenizer from the file's metadata. Raises ValueError for other kinds."""
        kind, pre = self._value("tokenizer.ggml.model"), self._value("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in _BYTE_LEVEL:
            raise ValueError(
                f"{self.path} has tokenizer {kind!r} with pre-tokenizer {pre!r}; supported in GGUF: 'gpt2' with one "
                f"of {_BYTE_LEVEL}. Use the checkpoint's safetensors folder with its tokenizer.json"
            )
        tokens, merges = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.merges")
        types = self._value("tokenizer.ggml.token_type") or [1] * len(tokens)
        space = bool(self._value("tokenizer.ggml.add_space_prefix", False))
        model = models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ", 1)) for m in merges])
        special = [t for t, kind in zip(tokens, types, strict=True) if kind == _TOKEN_CONTROL]
        user = [t for t, kind in zip(tokens, types, strict=True) if kind == _TOKEN_USER]
        raw, plain = _byte_level(model, space), _byte_level(model, space)
        for one in (raw, plain):
            one.add_tokens([AddedToken(t, normalized=False) for t in user])
            one.add_special_tokens([AddedToken(t, normalized=False) for t in special])
        plain.encode_special_tokens = True
        identity = json.dumps([kind, pre, space, tokens, merges, list(map(int, types))]).encode()
        eos = [self._value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return Tokenizer(
            raw,
            plain,
            chat_template=self._value("tokenizer.chat_template"),
            bos_id=self._value("tokenizer.ggml.bos_token_id"),
            eos_ids=[i for i in eos if i is not None],
            hash=hashlib.sha256(identity).hexdigest(),
        )

    def metadata(self) -> Mapping[str, Any]:
        """Scalar metadata of the file (no token lists)."""
        return {k: self._value(k) for k in self._reader.fields if not k.startswith(("tokenizer.ggml.", "GGUF."))}


def _byte_level(model: models.BPE, add_prefix_space: bool) -> RawTokenizer:
    tokenizer = RawTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
