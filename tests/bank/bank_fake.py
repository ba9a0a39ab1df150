"""A small made-up model for bank tests: identity, random memories, hash embeddings. Needs no model package."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from memory3.identity import Identity
from memory3.memory import Memory

IDENTITY = Identity(
    model_hash="m" * 64,
    tokenizer_hash="t" * 64,
    prefix_ids=(1, 2),
    context_bos_ids=(1,),
    layers=(0, 2, 5),
    head_map=None,
    tokens=4,
    span=128,
    head_dim=16,
    record_heads=2,
    rope_base=10000.0,
    rope_scaling=None,
    dtype="bfloat16",
    rule="received",
    embedder="hash-32",
)


def identity(**changes: object) -> Identity:
    return replace(IDENTITY, **changes)


class HashEmbedder:
    """Deterministic unit vectors from the words of a text; similar texts share words."""

    name = "hash-32"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 32), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split() or [text]:
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
                row += np.random.default_rng(seed).standard_normal(32).astype(np.float32)
            row /= np.linalg.norm(row) or 1
        return rows


class WordTokenizer:
    """One token per word, a number made from the word."""

    hash = "t" * 64

    def encode(self, text: str) -> list[int]:
        return [int.from_bytes(hashlib.sha256(w.encode()).digest()[:2], "little") for w in text.split()]

    encode_reference = encode


def memory_of(token_ids: Sequence[int], text: str = "", ident: Identity = IDENTITY, bias: bool = False) -> Memory:
    """The memory that the made-up model writes for these tokens: a function of the tokens alone."""
    seed = int.from_bytes(hashlib.sha256(np.asarray(token_ids, "<u4").tobytes()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ident.layers), 2, ident.record_heads, ident.tokens, ident.head_dim)
    n_valid = min(ident.tokens, len(token_ids))
    kv = torch.randn(shape, generator=generator).to(getattr(torch, ident.dtype))
    kv[..., n_valid:, :] = 0
    pos = torch.arange(ident.tokens, dtype=torch.int32).expand(shape[0], shape[2], shape[3]).clone()
    pos[..., n_valid:] = -1
    values = torch.randn(pos.shape, generator=generator) if bias else None
    return Memory(kv, pos, n_valid, list(token_ids), text, values)


def encode(token_lists: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> list[Memory]:
    return [memory_of(t, texts[i] if texts else "") for i, t in enumerate(token_lists)]


def texts(count: int, start: int = 0) -> list[str]:
    return [f"entry number {i} about topic {i % 7} and place {i * 31 % 101}" for i in range(start, start + count)]


def fill(bank, count: int, start: int = 0, **options) -> list[bytes]:
    words = texts(count, start)
    tokenizer = WordTokenizer()
    memories = [memory_of(tokenizer.encode(t), t, bank.identity, **options) for t in words]
    return bank.add(memories, HashEmbedder().encode(words))


class FakeModel:
    """What build_bank needs of a MemoryModel; memories come from `memory_of`."""

    class memory:
        span = 16

    tokenizer = WordTokenizer()

    def __init__(self, ident: Identity = IDENTITY, delay: float = 0.0):
        self._identity, self._delay = ident, delay
        self.written = 0

    def identity(self, embedder: str = "", codec: str = "dense") -> Identity:
        return replace(self._identity, embedder=embedder, codec=codec)

    def write_ids(self, token_lists: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> list[Memory]:
        time.sleep(self._delay)
        self.written += len(token_lists)
        return [memory_of(t, texts[i] if texts else "", self._identity) for i, t in enumerate(token_lists)]
