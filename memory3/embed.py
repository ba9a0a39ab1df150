"""Text embeddings for retrieval: all-MiniLM-L6-v2, run here directly from its safetensors file.

Any object with `name: str` and `encode(list[str]) -> float32 [N, E]` serves as an embedder; `as_embedder` wraps a
plain function. The name is part of a bank's identity: vectors of two encoders cannot be compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory3_kernels import int8_linear, int8_pays, memory_attention, native_reason, quantise_weight

from . import data
from .identity import hash_files
from .model.layers import Linear

MAX_TOKENS = 256
LAYER_NORM_EPS = 1e-12


@runtime_checkable
class SupportsEncode(Protocol):
    """What a bank and an engine need of an embedder."""

    @property
    def name(self) -> str:
        """Goes into a bank's identity."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E], one row per text."""
        ...


class FunctionEmbedder:
    """A function list[str] -> [N, E] as an embedder; rows are scaled to length 1."""

    def __init__(self, function: Callable[[list[str]], Any], name: str):
        if not name:
            raise ValueError("name must be a non-empty string: it identifies the embedder in a bank's header")
        self.name, self._function = name, function

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        result = self._function(list(texts))
        rows = np.asarray(result.detach().float().cpu() if isinstance(result, Tensor) else result, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(texts):
            raise ValueError(f"embedder {self.name!r} must return [{len(texts)}, E], got {list(rows.shape)}")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1)


def as_embedder(embedder: Any, name: str | None = None) -> SupportsEncode:
    """An embedder as it is; a plain function wrapped (under `name`, or its own); None: `Embedder()`."""
    if embedder is None:
        return Embedder()
    if isinstance(embedder, SupportsEncode) and callable(embedder.encode):
        return embedder
    if callable(embedder):
        return FunctionEmbedder(embedder, name or getattr(embedder, "__qualname__", type(embedder).__qualname__))
    raise TypeError(f"embedder must have name and encode(texts), or be a function, got {type(embedder).__name__}")


class Embedder:
    """all-MiniLM-L6-v2: mean of the last hidden states, length 1, at most 256 tokens. Loaded at first use.

    folder   Hugging Face folder of a BERT encoder (config.json, model.safetensors, tokenizer.json); None: the demo
             package (memory3.data)
    dtype    torch.int8: linear maps in bytes where that is faster (AVX-512), the rest in bf16 (docs/ops/int8_linear.md
             has what it does to vectors and rankings); torch.bfloat16; torch.float32: as published
    Raises DataMissing with the install command when the package is not there.
    """

    def __init__(self, folder: str | Path | None = None, dtype: torch.dtype = torch.int8, batch_size: int = 32):
        if dtype not in (torch.int8, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be torch.int8, torch.bfloat16 or torch.float32, got {dtype}")
        self.folder = data.path("minilm") if folder is None else Path(folder)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(f"{self.folder} has no {file}; folder must be a Hugging Face BERT folder")
        self.dtype, self.batch_size = dtype, batch_size
        self._guard = threading.Lock()
        self._loaded: tuple[Any, _Bert] | None = None
        self._name = ""

    @property
    def name(self) -> str:
        """Model, pooling, length and the hash of the files: differs when vectors would, roundings aside."""
        if not self._name:
            digest = hash_files(self.folder / file for file in ("model.safetensors", "tokenizer.json"))
            self._name = f"bert-mean-{MAX_TOKENS}:{digest[:32]}"
        return self._name

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, 384], each row of length 1, in the order of `texts`."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string; pass [text]")
        tokenizer, model = self._load()
        ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
        out = np.empty((len(ids), model.dim), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            out[part] = model([ids[i] for i in part]).numpy()
        return out

    def _load(self) -> tuple[Any, _Bert]:
        with self._guard:
            if self._loaded is None:
                from safetensors.torch import load_file
                from tokenizers import Tokenizer

                tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
                tokenizer.no_padding()
                tokenizer.enable_truncation(MAX_TOKENS)
                weights = load_file(self.folder / "model.safetensors")
                self._loaded = tokenizer, _Bert(self.folder / "config.json", weights, self.dtype)
            return self._loaded


class _Affine:
    """x W^T + b, and GELU of it, by the model's own linear layer: torch's bf16 products crawl on a CPU without
    instructions for them."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool = False):
        self.map = Linear(weight.shape[1], weight.shape[0], nn.Parameter(weight, requires_grad=False))
        self.bias, self.gelu = bias, gelu

    def __call__(self, x: Tensor) -> Tensor:
        out = self.map(x).add_(self.bias)
        return F.gelu(out) if self.gelu else out


class _Int8Affine:
    """The same in bytes."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool = False):
        self.weight, self.gelu = quantise_weight(weight, bias), gelu

    def __call__(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.gelu)


class _Bert:
    """BERT encoder forward with absolute positions and post-norm, mean-pooled; inference only.

    transformers computes the same, but importing it costs seconds before the first query can run.
    """

    def __init__(self, config: Path, weights: dict[str, Tensor], dtype: torch.dtype):
        import json

        about = json.loads(config.read_text())
        if about.get("model_type") != "bert" or about.get("hidden_act") != "gelu":
            raise ValueError(f"{config} must describe a bert model with gelu, got {about.get('model_type')!r}")
        self.heads, self.dim = about["num_attention_heads"], about["hidden_size"]
        affine = _Int8Affine if dtype is torch.int8 and int8_pays() else _Affine
        between = torch.bfloat16 if dtype is torch.int8 else dtype
        weights = {name.removeprefix("bert."): tensor.to(between) for name, tensor in weights.items()}

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self.words = weights["embeddings.word_embeddings.weight"]
        # Every token has type 0: its embedding joins the positions.
        self.places = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self.norm = pair("embeddings.LayerNorm")
        self.layers = []
        for i in range(about["num_hidden_layers"]):
            at = f"encoder.layer.{i}"
            qkv = [pair(f"{at}.attention.self.{which}") for which in ("query", "key", "value")]
            self.layers.append(
                (
                    affine(torch.cat([w for w, _ in qkv]), torch.cat([b for _, b in qkv])),
                    affine(*pair(f"{at}.attention.output.dense")),
                    pair(f"{at}.attention.output.LayerNorm"),
                    affine(*pair(f"{at}.intermediate.dense"), gelu=True),
                    affine(*pair(f"{at}.output.dense")),
                    pair(f"{at}.output.LayerNorm"),
                )
            )

    @torch.inference_mode()
    def __call__(self, ids: list[list[int]]) -> Tensor:
        """Token ids of N texts, ascending in length, end to end: nothing is padded. -> fp32 [N, dim], length 1."""
        lengths = [len(row) for row in ids]
        attend = self._attention(lengths)
        tokens = torch.tensor([token for row in ids for token in row])
        x = F.embedding(tokens, self.words) + torch.cat([self.places[:n] for n in lengths])
        x = F.layer_norm(x, (self.dim,), *self.norm, eps=LAYER_NORM_EPS)
        for qkv, merge, norm_attention, up, down, norm_mlp in self.layers:
            mixed = attend(qkv(x).view(len(x), 3, self.heads, -1)).reshape(x.shape)
            x = F.layer_norm(x + merge(mixed), (self.dim,), *norm_attention, eps=LAYER_NORM_EPS)
            x = F.layer_norm(x + down(up(x)), (self.dim,), *norm_mlp, eps=LAYER_NORM_EPS)
        text = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths))
        sums = torch.zeros(len(ids), self.dim).index_add_(0, text, x.float())
        return F.normalize(sums, dim=-1)

    def _attention(self, lengths: list[int]) -> Callable[[Tensor], Tensor]:
        """Attention of every token to those of its text: queries, keys and values [T, 3, H, D] -> [T, H, D].

        Texts are read as memory records are, each by its own rows: the op of this project is four times as fast on
        texts this short as torch's attention.
        """
        if native_reason() is not None:

            def plain(qkv: Tensor) -> Tensor:
                texts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths)]
                return torch.cat([F.scaled_dot_product_attention(q, k, v).transpose(0, 1) for q, k, v in texts])

            return plain
        # Every row begins a record as long as the longest text, of which as much is read as belongs to the row's text;
        # that text lies last, so that none reaches beyond the end.
        counts, longest = torch.tensor(lengths), max(lengths)
        begin = F.pad(counts.cumsum(0), (1, 0)).int()
        length = torch.zeros(sum(lengths), dtype=torch.int32)
        length[begin[:-1].long()] = counts.int()
        length, slot, no_context = length[: len(length) - longest + 1], begin[:-1, None], torch.zeros_like(begin)

        def native(qkv: Tensor) -> Tensor:
            row, head = qkv.stride(0), qkv.stride(2)
            records = (len(length), self.heads, longest, qkv.shape[-1]), (row, head, row, 1)
            k, v = (qkv[:, i].as_strided(*records) for i in (1, 2))
            return memory_attention(
                qkv[:, 0], None, None, begin, no_context, begin, k, v, slot, length,
                scale=qkv.shape[-1] ** -0.5, max_q=longest, max_k=0, max_chunk=longest,
            )[0]  # fmt: skip

        return native
