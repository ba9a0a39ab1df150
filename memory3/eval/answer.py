"""A model answers a batch of questions: loss of the right answers, and greedy text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import MemoryRead
from ..model.cache import KVCache, Prefix
from ..model.llama import Llama
from ..model.tokenizer import Tokenizer
from ..train.batch import Sample, make_batch

LOGIT_ROWS = {"cpu": 256, "cuda": 4096}
LOOK_EVERY = 8  # tokens between two looks at whether every answer has ended


@dataclass(frozen=True)
class Loaded:
    """Memories by number of the reference: kv [S, Lm, 2, Hm, K, D], length int32 [S], bias fp32 [S, Lm, Hm, K]."""

    slot: dict[int, int]
    kv: Tensor
    length: Tensor
    bias: Tensor | None = None


class Answerer:
    """One set of weights with one memory configuration, on any device. net: dense weights."""

    def __init__(self, net: Llama, tokenizer: Tokenizer) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.device = net.embed.device

    @cached_property
    def prefix(self) -> Prefix:
        with torch.inference_mode(False), torch.no_grad():
            return self.net.encode_prefix(self.net.memory.prefix_ids, self.net.memory.span)

    def losses(self, samples: Sequence[Sample], memories: Loaded | None) -> list[float]:
        """Nats of each sample's predicted tokens together; all samples with memory, or all without."""
        return [loss for loss, _ in self.scored(samples, memories)]

    @torch.no_grad()
    def scored(self, samples: Sequence[Sample], memories: Loaded | None) -> list[tuple[float, bool]]:
        """As `losses`, with whether greedy decoding would give the predicted tokens."""
        batch = make_batch(samples).to(self.device)
        read = prefix = None
        if batch.slots is not None:
            read, prefix = self._read(samples, memories, batch.cu_chunk), self.prefix
        hidden = self.net.hidden(batch.tokens, batch.cu, read, prefix).index_select(0, batch.rows)
        each, greedy, size = [], [], LOGIT_ROWS[self.device.type]
        for rows, wanted in zip(hidden.split(size), batch.targets.split(size), strict=True):
            logits = self.net.logits(rows)
            each.append(F.cross_entropy(logits, wanted, reduction="none"))
            greedy.append(logits.argmax(-1) == wanted)
        starts = np.cumsum([0, *(len(s.ids) - s.first for s in samples[:-1])])
        losses = np.add.reduceat(torch.cat(each).double().cpu().numpy(), starts)
        hits = np.logical_and.reduceat(torch.cat(greedy).cpu().numpy(), starts)
        return list(zip(losses.tolist(), hits.tolist(), strict=True))

    @torch.inference_mode()
    def texts(
        self, samples: Sequence[Sample], memories: Loaded | None, tokens: int = 24, stop: Sequence[str] = ("\n",)
    ) -> list[str]:
        """Greedy answers to the samples' prompts (ids[:first]), up to one of `stop` or `tokens` tokens."""
        prompts = [s.ids[: s.first] for s in samples]
        net, count = self.net, len(samples)
        with_memory = bool(samples[0].pieces)
        m = len(net.memory.prefix_ids) if with_memory else 0
        cache = KVCache(net.config, count, m + max(map(len, prompts)) + tokens, net.dtype, device=self.device)
        if with_memory:
            cache.start(self.prefix)
        flat = torch.tensor([t for p in prompts for t in p], device=self.device)
        cu = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(self.device, torch.int32)
        read = self._read(samples, memories, cu) if with_memory else None
        logits = net.prefill(flat, cu, cache, read)
        said = []
        for i in range(tokens):
            said.append(logits.argmax(-1))
            if i + 1 == tokens or ((i + 1) % LOOK_EVERY == 0 and all(self._ended(said, stop))):
                break
            logits = net.decode(said[-1], cache, read)
        return [self._text(ids, stop) for ids in torch.stack(said, 1).tolist()]

    def _ended(self, said: Sequence[Tensor], stop: Sequence[str]) -> Iterator[bool]:
        for ids in torch.stack(list(said), 1).tolist():
            yield any(t in self.tokenizer.eos_ids for t in ids) or _open(self.tokenizer.decode(ids), stop) is not None

    def _text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        end = next((i for i, t in enumerate(ids) if t in self.tokenizer.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special=True)
        ended = _open(text, stop)
        return (text.lstrip("\n") if ended is None else ended).strip()

    def _read(self, samples: Sequence[Sample], memories: Loaded, cu_chunk: Tensor) -> MemoryRead:
        rows = [[memories.slot[r] for r in sample.pieces[-1].reads] for sample in samples]
        width = max(map(len, rows))
        slots = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32, device=self.device)
        return MemoryRead(memories.kv, memories.length, slots.view(len(rows), width), cu_chunk, memories.bias)


def _open(text: str, stop: Sequence[str]) -> str | None:
    """What stands before the first `stop`, line breaks in front apart; None while there is none."""
    text = text.lstrip("\n")
    ends = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(ends)] if ends else None
