"""The loss of a batch: memories are written or loaded, read, and the predicted rows scored; all of it differentiable.

Memory3, arXiv 2407.01178, sections 3.3 and 3.5. "live" write encodes the batch's references with the weights being
trained: selected keys and values carry the gradient, the choice of tokens does not, and the references' hidden states
end with the last memory layer. "frozen" takes the records of a bank as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..memory import MemoryRead
from ..model.cache import Prefix
from ..model.llama import Llama
from ..write import by_length, encode_references, rows_at_once
from .batch import Batch
from .lora import base_weights, computing
from .packed import Packed, distance_to_base, hidden, pack
from .resident import Resident

HEAD_ROWS = 512  # rows of logits at once: 512 x 49,152 fp32 are 100 MB
HEAD_ROWS_GPU = 4096

Load = Callable[[Sequence[bytes]], tuple[Tensor, Tensor]]
"""Record ids -> frozen memories: kv [S, Lm, 2, Hm, K, D] and int32 [S], valid tokens."""
Tokens = Callable[[bytes], list[int]]


class Objective(nn.Module):
    """Sum of the losses of a batch's predicted tokens, in nats.

    tokens    of a reference, by record id, for live writing; None: memories are frozen
    load      of frozen memories; None: memories are written live
    resident  frozen memories that lie on the device, record ids being their numbers; in place of load
    """

    def __init__(
        self, net: Llama, tokens: Tokens | None = None, load: Load | None = None, resident: Resident | None = None
    ) -> None:
        super().__init__()
        self.net, self.resident, self._tokens, self._load = net, resident, tokens, load

    def pack(self, batch: Batch) -> Packed:
        """A batch on the CPU as this objective takes it fastest."""
        return pack(batch, self.net.memory, self.resident is not None)

    def forward(self, batch: Batch | Packed) -> Tensor:
        """Sum over all that is predicted. Raises ValueError where memories are read and there is nowhere to get them.

        Held sequences count with the distance of their distributions from those of the base weights.
        """
        net, batch = self.net, self._packed(batch)
        with computing(net):
            rows = self._hidden(batch)
            loss = token_loss(net, rows.index_select(0, batch.rows), batch.targets)
            if batch.base is None:
                return loss
            with torch.no_grad(), base_weights(net):
                base = hidden(net, batch.base, None).index_select(0, batch.base.rows)
            return loss + base_loss(net, rows.index_select(0, batch.base_rows), base)

    def predicted(self, batch: Batch | Packed) -> Tensor:
        """Hidden rows [N, dim], before the final norm, that batch.targets are predicted from."""
        batch = self._packed(batch)
        with computing(self.net):
            return self._hidden(batch).index_select(0, batch.rows)

    def _packed(self, batch: Batch | Packed) -> Packed:
        return batch if isinstance(batch, Packed) else self.pack(batch).to(batch.tokens.device)

    def _hidden(self, batch: Packed) -> Tensor:
        read = None
        if batch.slots is not None:
            kv, length = self._memories(batch.reads)
            read = MemoryRead(kv, length, batch.slots, batch.cu_chunk)
        return hidden(self.net, batch, read)

    def _memories(self, reads: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        net = self.net
        if self.resident is not None:
            return self.resident.kv, self.resident.length
        if self._load is not None:
            kv, length = self._load(reads)
            return kv.to(net.embed.device, net.dtype), length.to(net.embed.device)
        if self._tokens is None:
            raise ValueError("the batch reads memories: give the objective tokens (live write) or load (frozen write)")
        span = net.memory.span
        references = [self._tokens(record)[:span] for record in reads]
        length = torch.tensor([min(net.memory.tokens, len(r)) for r in references], dtype=torch.int32)
        prefix = net.encode_prefix(net.memory.prefix_ids, span)
        return write_live(net, prefix, references), length.to(net.embed.device)


def write_live(net: Llama, prefix: Prefix, references: Sequence[Sequence[int]]) -> Tensor:
    """kv [S, Lm, 2, Hm, K, D] with gradient, in the order of the references; recomputed if net.checkpointing is set.

    Batches are of similar length, as many rows as rows_at_once says.
    """
    most = rows_at_once(net.embed.device)
    order = sorted(range(len(references)), key=lambda i: len(references[i]))
    parts = by_length(order, references, most)

    def encode(part: list[int], k: Tensor, v: Tensor) -> Tensor:
        return encode_references(net, net.memory, Prefix(k, v, prefix.span), [references[i] for i in part])[0]

    recompute = net.checkpointing and torch.is_grad_enabled()
    written = [
        checkpoint(encode, part, prefix.k, prefix.v, use_reentrant=False)
        if recompute
        else encode(part, prefix.k, prefix.v)
        for part in parts
    ]
    if not written:
        return encode([], prefix.k, prefix.v)
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    return torch.cat(written).index_select(0, back.to(net.embed.device))


def token_loss(net: Llama, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies in nats; hidden [N, dim] before the final norm, targets int64 [N].

    The logits of only HEAD_ROWS rows exist at a time: they are recomputed in the backward pass.
    """
    return _in_parts(lambda rows, wanted: F.cross_entropy(net.logits(rows), wanted, reduction="sum"), hidden, targets)


def base_loss(net: Llama, hidden: Tensor, base: Tensor) -> Tensor:
    """Sum of the distances of distributions from those of `base`, both [N, dim] before the final norm, in nats."""
    return _in_parts(lambda rows, wanted: distance_to_base(net.logits(rows), net.logits(wanted)), hidden, base)


def _in_parts(piece: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, wanted: Tensor) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    size = HEAD_ROWS if hidden.device.type == "cpu" else HEAD_ROWS_GPU
    several = len(wanted) > size and torch.is_grad_enabled()
    for rows, part in zip(hidden.split(size), wanted.split(size), strict=True):
        total = total + (checkpoint(piece, rows, part, use_reentrant=False) if several else piece(rows, part))
    return total
