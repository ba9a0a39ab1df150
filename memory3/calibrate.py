"""Choosing memory layers and tokens per head for a checkpoint that was not trained with memory.

Every candidate is judged by what matters: the loss on a passage of a reference when the model reads that reference,
among others, as explicit memory. (Memory3, arXiv 2407.01178, Remarks 1 and 4: the first half is not the only choice.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MemoryConfig
from .memory import MemoryRead
from .model.llama import Llama
from .model.load import MemoryModel
from .write import BATCH_ROWS, encode_references


class Sample(NamedTuple):
    """A question to the model: `answer` is scored after `prompt`; `reference` holds what it needs. All token ids."""

    prompt: list[int]
    answer: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Candidate:
    """One measured setting: `nll` in nats per answer token, `bytes` of one memory in the model's dtype."""

    band: str
    layers: tuple[int, ...]
    tokens: int
    rule: str
    bytes: int
    nll: float


@dataclass(frozen=True)
class Calibration:
    """All candidates, the best one within the budget, and the loss without memory and with the text in the context."""

    table: tuple[Candidate, ...]
    best: Candidate
    nll_without: float
    nll_text: float
    samples: int
    answer_tokens: int

    def memory(self, base: MemoryConfig) -> MemoryConfig:
        """`base` with the layers, tokens and rule of the best candidate (all KV heads)."""
        best = self.best
        return replace(base, layers=best.layers, tokens=best.tokens, rule=best.rule, head_map=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def default_bands(n_layers: int) -> dict[str, tuple[int, ...]]:
    """The paper's first half, the 25-75 % band of its Remark 1, the last half, and all layers."""
    half, quarter = n_layers // 2, n_layers // 4
    bands = {
        "first half": range(0, max(1, half)),
        "middle": range(quarter, max(quarter + 1, n_layers - quarter)),
        "last half": range(half, n_layers),
        "all": range(n_layers),
    }
    return {name: tuple(layers) for name, layers in bands.items()}


def samples_from_texts(model: MemoryModel, texts: Sequence[str], limit: int = 30, seed: int = 0) -> list[Sample]:
    """Up to `limit` samples: a passage from inside a text is the answer, the 12 tokens before it the prompt.

    The reference is the text, cut at the model's span. Texts of fewer than 40 tokens are left out; the drawing of
    texts and passages follows `seed`. Raises ValueError when no text is long enough.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible draw, not a secret
    texts = list(texts)
    rng.shuffle(texts)
    samples: list[Sample] = []
    for text in texts:
        reference = model.tokenizer.encode_reference(text)[: model.memory.span]
        if len(reference) < 40:
            continue
        start = rng.randrange(len(reference) - 36)
        prompt, answer = reference[start : start + 12], reference[start + 12 : start + 36]
        samples.append(Sample(prompt, answer, reference))
        if len(samples) == limit:
            break
    if not samples:
        raise ValueError("no text has 40 tokens or more; give longer texts")
    return samples


@torch.no_grad()
def calibrate(
    model: MemoryModel,
    texts: Sequence[str | Sample],
    *,
    bands: Mapping[str, Sequence[int]] | None = None,
    tokens: Sequence[int] = (8, 16, 32),
    rules: Sequence[str] | None = None,
    byte_budget: int | None = None,
    limit: int = 30,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Measure every band x tokens x rule on up to `limit` samples and pick the least loss within `byte_budget`.

    texts: references as plain text (see samples_from_texts), or Samples made by the caller. Each sample reads its own
    reference and refs - 1 others, drawn by `seed`. bands: name -> layer numbers (default_bands). rules: default the
    model's own rule. byte_budget: most bytes of one memory. progress(done, total, what).
    Raises ValueError when there is no usable text or no candidate within the budget.
    """
    config, base = model.config, model.memory
    given = [t for t in texts if isinstance(t, Sample)]
    samples = given[:limit] or samples_from_texts(model, [t for t in texts if isinstance(t, str)], limit, seed)
    bands = {name: tuple(sorted(layers)) for name, layers in (bands or default_bands(config.n_layers)).items()}
    settings = [
        replace(base, layers=layers, tokens=k, rule=rule, head_map=None)
        for rule in (rules or (base.rule,)) for k in tokens for layers in bands.values()
    ]  # fmt: skip
    sizes = [torch.Size(s.record_shape(config)).numel() * model.net.embed.element_size() for s in settings]
    if byte_budget is not None and min(sizes) > byte_budget:
        raise ValueError(f"byte_budget={byte_budget} is below the smallest candidate, {min(sizes)} bytes per memory")
    reader = _Reader(model, samples, seed)
    total = len(settings) + 2
    notify = progress or (lambda done, total, what: None)

    without = reader.nll(model.net, None)
    notify(1, total, "no memory")
    with_text = reader.nll_with_text(model.net)
    notify(2, total, "text in the context")
    names = list(bands) * (len(settings) // len(bands))
    table: list[Candidate] = []
    written: tuple[tuple[int, str], Tensor] | None = None
    for name, setting, size in zip(names, settings, sizes, strict=True):
        key = (setting.tokens, setting.rule)
        if written is None or written[0] != key:  # one encoding of all layers serves every band
            everywhere = replace(setting, layers=tuple(range(config.n_layers)))
            written = key, _encode(model, everywhere, [s.reference for s in samples])
        net = model.net.with_memory(setting)
        loss = reader.nll(net, written[1][:, list(setting.layers)])
        table.append(Candidate(name, setting.layers, setting.tokens, setting.rule, size, loss))
        notify(2 + len(table), total, f"{name}, {setting.tokens} tokens, {setting.rule}")
    allowed = [c for c in table if byte_budget is None or c.bytes <= byte_budget]
    best = min(allowed, key=lambda c: (c.nll, c.bytes))
    answer_tokens = sum(len(s.answer) for s in samples)
    return Calibration(tuple(table), best, without, with_text, len(samples), answer_tokens)


def _encode(model: MemoryModel, memory: MemoryConfig, references: Sequence[Sequence[int]]) -> Tensor:
    size = max(1, BATCH_ROWS // memory.span)
    batches = [references[i : i + size] for i in range(0, len(references), size)]
    return torch.cat([encode_references(model.net, memory, model.prefix, batch)[0] for batch in batches])


class _Reader:
    """Answer loss of the samples, each in its own sequence after the context BOS."""

    def __init__(self, model: MemoryModel, samples: Sequence[Sample], seed: int) -> None:
        self.model = model
        self.samples = samples
        rng = random.Random(seed)  # noqa: S311 - a reproducible draw, not a secret
        n, count = len(samples), min(model.memory.refs or 1, len(samples))
        slots = []
        for i in range(n):
            row = [i, *rng.sample([j for j in range(n) if j != i], count - 1)]
            rng.shuffle(row)
            slots.append(row)
        self.slots = torch.tensor(slots, dtype=torch.int32)

    def nll(self, net: Llama, kv: Tensor | None) -> float:
        """Mean loss per answer token, reading kv [S, Lm, 2, Hm, K, D] (sample i's reference in slot i) or nothing."""
        context = list(self.model.memory.context_bos_ids)
        return self._loss(net, [context + s.prompt + s.answer for s in self.samples], kv)

    def nll_with_text(self, net: Llama) -> float:
        """The same with each sample's own reference as text in front."""
        opening, context = list(self.model.memory.prefix_ids), list(self.model.memory.context_bos_ids)
        return self._loss(net, [opening + s.reference + context + s.prompt + s.answer for s in self.samples], None)

    def _loss(self, net: Llama, sequences: Sequence[list[int]], kv: Tensor | None) -> float:
        total, count = 0.0, 0
        size = max(1, 4 * BATCH_ROWS // max(map(len, sequences)))
        for lo in range(0, len(sequences), size):
            part, samples = sequences[lo : lo + size], self.samples[lo : lo + size]
            ends = torch.tensor([0, *map(len, part)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            read = prefix = None
            if kv is not None:
                lengths = [min(kv.shape[4], len(s.reference)) for s in self.samples]
                prefix = self.model.prefix
                read = MemoryRead(
                    kv, torch.tensor(lengths, dtype=torch.int32), self.slots[lo : lo + size].contiguous(), ends
                )
            hidden = net.hidden(torch.tensor([t for s in part for t in s]), ends, read, prefix)
            rows = [
                int(end) - len(s.answer) - 1 + i
                for end, s in zip(ends[1:], samples, strict=True) for i in range(len(s.answer))
            ]  # fmt: skip
            targets = torch.tensor([t for s in samples for t in s.answer])
            total += float(F.cross_entropy(net.logits(hidden[rows]), targets, reduction="sum"))
            count += len(targets)
        return total / count
