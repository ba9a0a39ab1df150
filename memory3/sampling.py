"""From logits to the next token: greedy, or temperature with top-k and nucleus filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 switch their filter off.

    seed makes a run repeatable: sequence b of a batch draws from its own generator, seeded with seed + b, so what it
    says does not depend on the others. None: another text every time.
    """

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

    def generators(self, count: int) -> list[torch.Generator]:
        """One per sequence of a batch."""
        made = [torch.Generator() for _ in range(count)]
        for b, generator in enumerate(made):
            if self.seed is None:
                generator.seed()  # a fresh generator is not random by itself
            else:
                generator.manual_seed(self.seed + b)
        return made


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next tokens int64 [B] from logits [B, V]; one generator per row."""
    if sampling.temperature == 0:
        return greedy(logits)
    probability = filtered(logits, sampling).softmax(-1)
    rows = zip(probability, generators, strict=True)
    return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in rows])


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, int64 [B]; of equals the first.

    On a CPU by numpy, on this thread alone: torch would wake its threads for some microseconds of work, and OpenMP's
    then spin on the cores that the next step needs.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits fp32 [B, V] over the temperature (which must not be 0), -inf where a filter cuts."""
    logits = logits.float()
    # From the row's maximum down: a tiny temperature gives -inf, never inf - inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k:
        kth = scaled.topk(min(sampling.top_k, scaled.shape[-1]), -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        # A token is cut when the mass before it already reaches top_p: the first one always stays.
        cut = probability.cumsum(-1) - probability >= sampling.top_p
        scaled = scaled.scatter(-1, order, ordered.masked_fill(cut, -torch.inf))
    return scaled
