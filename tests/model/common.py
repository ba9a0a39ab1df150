"""A tiny model with random weights, and small helpers of these tests."""

from __future__ import annotations

import torch

from memory3 import MemoryConfig, ModelConfig
from memory3.model.llama import Llama

TINY = ModelConfig(
    vocab_size=97,
    dim=48,
    n_layers=4,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=64,
    rope_base=1000.0,
    max_context=128,
    tied=False,
)
TINY_MEMORY = MemoryConfig(
    layers=(0, 1, 3), tokens=4, span=16, rule="received", chunk=8, prefix_ids=(1, 5, 6), context_bos_ids=(1,)
)


def tiny(dtype: torch.dtype = torch.float32, memory: MemoryConfig | None = TINY_MEMORY, seed: int = 0) -> Llama:
    """Random weights large enough that attention is far from uniform."""
    return Llama(TINY, memory).to(dtype).init_weights(seed, std=0.3).requires_grad_(False)


def cu(*counts: int) -> torch.Tensor:
    """int32 boundaries of packed sequences."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def random_ids(generator: torch.Generator, *counts: int, vocab: int = 97) -> list[list[int]]:
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in counts]


def rel(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
