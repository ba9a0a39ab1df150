"""What this GPU reaches at its best, in the run that quotes it: reading, copying and multiplying large tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clock import Clock

BYTES = 1 << 30  # many times any second-level cache
SIDE = 8192  # of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """read, copy: GB/s of memory (a copy's bytes count twice: read and written); matmul: bf16 TFLOP/s."""

    read_gb_s: float
    copy_gb_s: float
    matmul_tflops: float


def measure(clock: Clock, rounds: int = 10, device: str = "cuda", size: int = BYTES, side: int = SIDE) -> Ceilings:
    """Medians of `rounds`; torch's own sum, copy and matrix product, on random values."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    read = clock.measure(lambda: source.sum(), rounds).cold.median
    copy = clock.measure(lambda: target.copy_(source), rounds).cold.median
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = clock.measure(lambda: a @ b, rounds).cold.median
    return Ceilings(size / read / 1e3, 2 * size / copy / 1e3, 2 * side**3 / product / 1e6)
