"""From logits to the next token: greedy, or temperature with top-k and nucleus filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 switch their filter off; seed makes a run repeatable."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, got {self.top_k}")

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        return generator.manual_seed(self.seed) if self.seed is not None else generator


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens int64 [B] from logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = scaled.topk(min(sampling.top_k, scaled.shape[-1]), -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        # A token is cut when the mass before it already reaches top_p: the first one always stays.
        cut = probability.cumsum(-1) - probability >= sampling.top_p
        scaled = scaled.scatter(-1, order, ordered.masked_fill(cut, -torch.inf))
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
