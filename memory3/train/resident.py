"""Frozen memories that stay on the device: written once before training by the base weights, read by slot number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.llama import Llama
from ..write import by_length, encode_references, rows_at_once

Through = Callable[[Tensor], Tensor]
"""kv [N, Lm, 2, Hm, K, D] -> the same after a codec."""


@dataclass(frozen=True)
class Resident:
    """kv [S, Lm, 2, Hm, K, D] and length int32 [S], valid tokens, on the device.

    Slot n is reference number n; with a codec, slot `coded` + n is what the codec leaves of it.
    """

    kv: Tensor
    length: Tensor
    coded: int | None = None

    @classmethod
    @torch.no_grad()
    def write(
        cls,
        net: Llama,
        references: Sequence[Sequence[int]],
        codec: Through | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Resident:
        """References as token lists, without the prefix; tokens beyond the span are cut off.

        progress: told after every batch how many are written.
        """
        memory, device = net.memory, net.embed.device
        cut = [list(r[: memory.span]) for r in references]
        prefix = net.encode_prefix(memory.prefix_ids, memory.span)
        planes = 1 if codec is None else 2
        kv = torch.empty((planes * len(cut), *memory.record_shape(net.config)), dtype=net.dtype, device=device)
        order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
        done = 0
        for part in by_length(order, cut, rows_at_once(device)):
            written, _ = encode_references(net, memory, prefix, [cut[i] for i in part])
            at = torch.tensor(part, device=device)
            kv[at] = written
            if codec is not None:
                kv[at + len(cut)] = codec(written)
            done += len(part)
            progress(done)
        length = torch.tensor([min(memory.tokens, len(r)) for r in cut] * planes, dtype=torch.int32, device=device)
        return cls(kv, length, None if codec is None else len(cut))
