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
from ..write import BATCH_ROWS, encode_references
from .batch import Batch

HEAD_ROWS = 512  # rows of logits at once: 512 x 49,152 fp32 are 100 MB

Load = Callable[[Sequence[bytes]], tuple[Tensor, Tensor]]
"""Record ids -> frozen memories: kv [S, Lm, 2, Hm, K, D] and int32 [S], valid tokens."""
Tokens = Callable[[bytes], list[int]]


class Objective(nn.Module):
    """Sum of the losses of a batch's predicted tokens, in nats.

    tokens   of a reference, by record id, for live writing; None: memories are frozen
    load     of frozen memories; None: memories are written live
    """

    def __init__(self, net: Llama, tokens: Tokens | None = None, load: Load | None = None) -> None:
        super().__init__()
        self.net, self._tokens, self._load = net, tokens, load

    def forward(self, batch: Batch) -> Tensor:
        """Sum over batch.targets. Raises ValueError for a batch with memory where there is nowhere to get it from."""
        net, read, prefix = self.net, None, None
        if batch.slots is not None:
            prefix = net.encode_prefix(net.memory.prefix_ids, net.memory.span)
            kv, length = self._memories(batch.reads, prefix)
            read = MemoryRead(kv, length, batch.slots, batch.cu_chunk)
        hidden = net.hidden(batch.tokens, batch.cu, read, prefix)
        return token_loss(net, hidden.index_select(0, batch.rows), batch.targets)

    def _memories(self, reads: Sequence[bytes], prefix: Prefix) -> tuple[Tensor, Tensor]:
        net = self.net
        if self._load is not None:
            kv, length = self._load(reads)
            return kv.to(net.embed.device, net.dtype), length.to(net.embed.device)
        if self._tokens is None:
            raise ValueError("the batch reads memories: give the objective tokens (live write) or load (frozen write)")
        span = net.memory.span
        references = [self._tokens(record)[:span] for record in reads]
        length = torch.tensor([min(net.memory.tokens, len(r)) for r in references], dtype=torch.int32)
        return write_live(net, prefix, references), length.to(net.embed.device)


def write_live(net: Llama, prefix: Prefix, references: Sequence[Sequence[int]]) -> Tensor:
    """kv [S, Lm, 2, Hm, K, D] with gradient, in the order of the references; recomputed if net.checkpointing is set.

    Batches are of similar length, at most BATCH_ROWS rows.
    """
    order = sorted(range(len(references)), key=lambda i: len(references[i]))
    parts: list[list[int]] = []
    for i in order:
        if not parts or (len(parts[-1]) + 1) * len(references[i]) > BATCH_ROWS:
            parts.append([])
        parts[-1].append(i)

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

    def piece(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(net.logits(rows), wanted, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    several = len(targets) > HEAD_ROWS and torch.is_grad_enabled()
    for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        total = total + (checkpoint(piece, rows, wanted, use_reentrant=False) if several else piece(rows, wanted))
    return total
