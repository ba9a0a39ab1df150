"""One forward pass of training: every sequence of a batch, and the constant prefix they share, in one pack of rows.

The prefix is the first sequence of the pack; those in memory mode put its keys and values in front of their own, so it
costs no pass of its own, and sequences with and without memory go together. All index tensors are made on the CPU,
ahead of the step: the forward pass waits for no device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memory3_kernels import memory_attention

from ..config import MemoryConfig
from ..memory import MemoryRead
from ..model.llama import Llama, places
from .batch import Batch


@dataclass(frozen=True)
class Packed:
    """Operands of `hidden` and of the loss.

    tokens, positions  int64 [T], the m rows of the prefix first where a sequence is in memory mode
    cu, cu_k           int32 [B + 1] of queries and of keys; take int64 [Tk], the row behind each key, None: every row
    cu_chunk, slots    int32 [C + 1], [C, R], or None where nothing is read; reads: record ids by slot
    rows, targets      int64 [N]: what is predicted
    base_rows          int64 [M], rows of plain text that are held to the base weights, None without; base: the pack of
                       those sequences alone, in the same order, all its rows predicted
    max_q, max_k       longest sequence in queries and in keys; text: tokens that are no prefix
    """

    tokens: Tensor
    positions: Tensor
    cu: Tensor
    cu_k: Tensor
    take: Tensor | None
    cu_chunk: Tensor | None
    slots: Tensor | None
    reads: tuple[Hashable, ...]
    rows: Tensor
    targets: Tensor
    max_q: int
    max_k: int
    text: int
    base_rows: Tensor | None = None
    base: Packed | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Packed:
        """The same pack on a device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packed:
        """The same pack in pages that a GPU copies from without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, move) -> Packed:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, x in moved.items():
            if isinstance(x, Tensor):
                moved[name] = move(x)
            elif isinstance(x, Packed):
                moved[name] = x._each(move)
        return Packed(**moved)

    @property
    def predicted(self) -> int:
        """Rows that the loss is a sum over."""
        return len(self.targets) + (0 if self.base_rows is None else len(self.base_rows))


def pack(batch: Batch, memory: MemoryConfig | None, resident: bool = False) -> Packed:
    """The pack of a batch that lies on the CPU (elsewhere this waits for the device).

    resident: record ids are numbers of slots that are filled before training (memory3.train.resident).
    """
    cu = batch.cu.cpu().numpy().astype(np.int64)
    counts = np.diff(cu)
    reading = np.zeros(len(counts), bool) if batch.in_memory is None else batch.in_memory.cpu().numpy()
    m = memory.prefix_len if reading.any() else 0
    span = memory.span if reading.any() else 0
    first = np.where(reading, m + span, 0)
    positions = places(counts) + np.repeat(first, counts)
    take, counts_k = None, counts
    if m:
        counts, reading = np.concatenate(([m], counts)), np.concatenate(([False], reading))
        positions = np.concatenate((np.arange(m), positions))
        counts_k = counts + m * reading
        # A key's row: its place behind the sequence's first key, moved to the sequence; of the prefix, as it stands.
        starts, inside = _offsets(counts), places(counts_k) - np.repeat(m * reading, counts_k)
        take = torch.from_numpy(np.where(inside < 0, inside + m, inside + np.repeat(starts[:-1], counts_k)))
    chunks = slots = None
    if batch.slots is not None and batch.reads:
        chunks, slots = batch.cu_chunk, batch.slots
        if resident:
            numbers = torch.tensor(batch.reads, dtype=torch.int32, device=slots.device)
            slots = torch.where(slots >= 0, numbers[slots.clamp_min(0).long()], slots)
        if m:
            chunks = torch.cat((chunks[:1], chunks + m))
            slots = torch.cat((slots.new_full((1, slots.shape[1]), -1), slots))
    prefix = list(memory.prefix_ids) if m else []
    return Packed(
        torch.cat((batch.tokens.new_tensor(prefix), batch.tokens)),
        torch.from_numpy(positions),
        torch.from_numpy(_offsets(counts).astype(np.int32)),
        torch.from_numpy(_offsets(counts_k).astype(np.int32)),
        take,
        chunks,
        slots,
        batch.reads,
        batch.rows + m,
        batch.targets,
        int(counts.max(initial=0)),
        int(counts_k.max(initial=0)),
        int(cu[-1]),
        None if batch.base_rows is None else batch.base_rows + m,
        None if batch.base is None else pack(batch.base, None),
    )


def hidden(net: Llama, batch: Packed, read: MemoryRead | None) -> Tensor:
    """Hidden rows [T, dim] of the last layer, before the final norm; differentiable in the weights and the memories."""
    x = net.embed[batch.tokens]
    rotary = net.rope.at(batch.positions, x.dtype)
    cu_chunk = batch.cu if read is None else read.cu_chunk

    def run(layer: int, x: Tensor) -> Tensor:
        block = net.blocks[layer]
        q, k, v = net.split(block.project(x), rotary)
        if batch.take is not None:
            k, v = k.index_select(0, batch.take), v.index_select(0, batch.take)
        out, _, _ = memory_attention(
            q, k, v, batch.cu, batch.cu_k, cu_chunk, *net.memory_args(layer, read, len(cu_chunk) - 1),
            scale=net.scale, max_q=batch.max_q, max_k=batch.max_k, max_chunk=batch.max_q,
        )  # fmt: skip
        return block.finish(x, out)

    recompute = net.checkpointing and torch.is_grad_enabled()
    for layer in range(net.config.n_layers):
        x = checkpoint(run, layer, x, use_reentrant=False) if recompute else run(layer, x)
    return x


def distance_to_base(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum over rows of the Kullback-Leibler divergence of softmax(logits) from softmax(wanted), both [N, V], nats."""
    target = F.log_softmax(wanted, dim=-1)
    return F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="sum", log_target=True)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))
