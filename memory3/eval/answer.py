"""A model answers a batch of questions: loss of the right answers, and greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import MemoryRead
from ..model.cache import KVCache, Prefix
from ..model.llama import Llama
from ..model.tokenizer import Tokenizer
from ..train.batch import Sample, make_batch

LOGIT_ROWS = 256


@dataclass(frozen=True)
class Loaded:
    """Memories by number of the reference: kv [S, Lm, 2, Hm, K, D], length int32 [S], bias fp32 [S, Lm, Hm, K]."""

    slot: dict[int, int]
    kv: Tensor
    length: Tensor
    bias: Tensor | None = None


class Answerer:
    """One set of weights with one memory configuration. net: dense weights, on a CPU."""

    def __init__(self, net: Llama, tokenizer: Tokenizer) -> None:
        self.net, self.tokenizer = net, tokenizer

    @cached_property
    def prefix(self) -> Prefix:
        with torch.no_grad():
            return self.net.encode_prefix(self.net.memory.prefix_ids, self.net.memory.span)

    def losses(self, samples: Sequence[Sample], memories: Loaded | None) -> list[float]:
        """Nats of each sample's predicted tokens together; all samples with memory, or all without."""
        return [loss for loss, _ in self.scored(samples, memories)]

    @torch.no_grad()
    def scored(self, samples: Sequence[Sample], memories: Loaded | None) -> list[tuple[float, bool]]:
        """As `losses`, with whether greedy decoding would give the predicted tokens."""
        batch = make_batch(samples)
        read = prefix = None
        if batch.slots is not None:
            read, prefix = self._read(samples, memories, batch.cu_chunk), self.prefix
        hidden = self.net.hidden(batch.tokens, batch.cu, read, prefix).index_select(0, batch.rows)
        each, greedy = [], []
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), batch.targets.split(LOGIT_ROWS), strict=True):
            logits = self.net.logits(rows)
            each.append(F.cross_entropy(logits, wanted, reduction="none"))
            greedy.append(logits.argmax(-1) == wanted)
        counts = [len(s.ids) - s.first for s in samples]
        parts = zip(torch.cat(each).split(counts), torch.cat(greedy).split(counts), strict=True)
        return [(float(loss.sum()), bool(hit.all())) for loss, hit in parts]

    @torch.inference_mode()
    def texts(
        self, samples: Sequence[Sample], memories: Loaded | None, tokens: int = 24, stop: Sequence[str] = ("\n",)
    ) -> list[str]:
        """Greedy answers to the samples' prompts (ids[:first]), up to one of `stop` or `tokens` tokens."""
        prompts = [s.ids[: s.first] for s in samples]
        net, count = self.net, len(samples)
        with_memory = bool(samples[0].pieces)
        m = len(net.memory.prefix_ids) if with_memory else 0
        cache = KVCache(net.config, count, m + max(map(len, prompts)) + tokens, net.dtype)
        if with_memory:
            cache.start(self.prefix)
        flat = torch.tensor([t for p in prompts for t in p])
        cu = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(torch.int32)
        read = self._read(samples, memories, cu) if with_memory else None
        logits = net.prefill(flat, cu, cache, read)
        said: list[list[int]] = [[] for _ in prompts]
        open_ = [True] * count
        for i in range(tokens):
            chosen = logits.argmax(-1)
            for b, token in enumerate(chosen.tolist()):
                if not open_[b]:
                    continue
                said[b].append(token)
                text = self.tokenizer.decode(said[b]).lstrip("\n")
                if token in self.tokenizer.eos_ids or any(end in text for end in stop):
                    open_[b] = False
            if not any(open_) or i + 1 == tokens:
                break
            logits = net.decode(chosen, cache, read)
        return [_until(self.tokenizer.decode(ids, skip_special=True).lstrip("\n"), stop) for ids in said]

    def _read(self, samples: Sequence[Sample], memories: Loaded, cu_chunk: Tensor) -> MemoryRead:
        rows = [[memories.slot[r] for r in sample.pieces[-1].reads] for sample in samples]
        width = max(map(len, rows))
        slots = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32).view(
            len(rows), width
        )
        return MemoryRead(memories.kv, memories.length, slots, cu_chunk, memories.bias)


def _until(text: str, stop: Sequence[str]) -> str:
    for end in stop:
        text = text.partition(end)[0]
    return text.strip()
