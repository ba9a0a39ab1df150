"""Live writing of references that all have one length: no prefix, no padding, and nothing that waits for a GPU.

What `memory3.write` does for any references, in a third of the launches: a small model's step is little else.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from memory3_kernels import gather_memory, memory_attention, select_tokens

from ..model.llama import Llama
from .batch import Batch
from .files import whole
from .objective import Objective, Tokens
from .packed import Packed


class AlignedObjective(Objective):
    """Objective whose references, `length` tokens each by `tokens`, travel with the batch instead of their ids.

    targets   token ids that are predicted, wherever they stand; None: all rows of the batch that are
    Raises ValueError for a memory configuration with prefix tokens.
    """

    def __init__(self, net: Llama, tokens: Tokens, length: int, targets: range | None = None) -> None:
        super().__init__(net, tokens)
        if net.memory.prefix_ids:
            raise ValueError(f"memory.prefix_ids: expected none, got {net.memory.prefix_ids}")
        self._length, self._targets = length, targets
        self._constant: dict[tuple, tuple[Tensor, ...]] = {}

    def pack(self, batch: Batch) -> Packed:
        """`reads` of the pack are tokens, int64 [S, length]."""
        packed = super().pack(batch)
        references = [self._tokens(record) for record in batch.reads]
        if self._targets is not None:
            asked = (packed.targets >= self._targets.start) & (packed.targets < self._targets.stop)
            packed = replace(packed, rows=packed.rows[asked], targets=packed.targets[asked])
        return replace(packed, reads=torch.tensor(references, dtype=torch.int64).view(-1, self._length))

    def _memories(self, reads: Tensor) -> tuple[Tensor, Tensor]:
        return self._write(self.net, reads)

    def _write(self, net: Llama, reads: Tensor) -> tuple[Tensor, Tensor]:
        memory, (count, length) = net.memory, reads.shape
        key = (count, reads.device)
        if key not in self._constant:
            ends = torch.arange(count + 1, dtype=torch.int32, device=reads.device) * length
            places = torch.arange(length, device=reads.device).repeat(count)
            whole = torch.full((count,), length, dtype=torch.int32, device=reads.device)
            self._constant[key] = ends, places, whole, whole.clamp(max=memory.tokens)
        ends, places, whole, kept = self._constant[key]
        x = net.embed[reads.flatten()]
        rotary = net.rope.at(places, x.dtype)
        layers = []
        for layer, block in enumerate(net.blocks[: memory.layers[-1] + 1]):
            qkv = block.project(x)
            q, k, v = net.split(qkv, rotary)
            if layer in memory.layers:
                heads, own = net.config.n_heads, net.config.n_kv_heads
                score = (q, k) if memory.rule == "causal" else (qkv[:, :heads], qkv[:, heads : heads + own])
                with torch.no_grad():
                    chosen = select_tokens(
                        *(s.unflatten(0, (count, length)) for s in score), whole, tokens=memory.tokens, start=0,
                        scale=net.scale, rule=memory.rule,
                    )  # fmt: skip
                layers.append(gather_memory(*(s.unflatten(0, (count, length)) for s in (k, v)), chosen))
            if layer == memory.layers[-1]:
                break
            out, _, _ = memory_attention(
                q, k, v, ends, ends, ends, *net.memory_args(layer, None, count),
                scale=net.scale, max_q=length, max_k=length, max_chunk=length,
            )  # fmt: skip
            x = block.finish(x, out)
        return torch.stack(layers, dim=1), kept


class FrozenAligned(AlignedObjective):
    """The same with memories written by the weights as they were when the first was read in training.

    file   where those weights are kept, for a run that is resumed
    """

    def __init__(self, net: Llama, tokens: Tokens, length: int, targets: range | None = None, *, file: Path) -> None:
        super().__init__(net, tokens, length, targets)
        self._file, self._writer = file, None

    def _memories(self, reads: Tensor) -> tuple[Tensor, Tensor]:
        if self._writer is None and len(reads) and (self.net.training or self._file.is_file()):
            self._freeze()
        if self._writer is None:  # an evaluation before any memory is read
            return super()._memories(reads)
        with torch.no_grad():
            return self._write(self._writer[0], reads)

    def _freeze(self) -> None:
        writer = copy.deepcopy(self.net).requires_grad_(False)
        if self._file.is_file():
            load_model(writer, self._file)
        else:
            with whole(self._file) as partial:
                save_model(writer, str(partial))
        self._writer = (writer,)  # in a tuple: no part of this module
