"""The decoding loop: samples, ends sequences, shrinks the batch, and turns tokens into text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .generation import Generation
from .sampling import Sampling, sample
from .session import Session
from .streaming import Detokenizer


@dataclass(frozen=True)
class Options:
    """Of one run; see Engine.generate."""

    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    on_text: Callable[[int, str], None] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not s for s in self.stop):
            raise ValueError("stop: expected non-empty texts, got an empty one")


def write_on(
    session: Session, logits: Tensor, prompt_tokens: Sequence[int], begin: float, options: Options
) -> list[Generation]:
    """Continues a session whose prompts are fed; `begin` is when the call started (time.perf_counter).

    A sequence that ends leaves the batch, so that the others no longer wait for it and nothing is retrieved for it.
    """
    tokenizer, stats, on_text = session.engine.model.tokenizer, session.stats, options.on_text
    eos = () if options.ignore_eos else tokenizer.eos_ids
    count = len(prompt_tokens)
    texts = [Detokenizer(tokenizer, options.stop, partial(on_text, b) if on_text else None) for b in range(count)]
    generators = options.sampling.generators(count)
    tokens: list[list[int]] = [[] for _ in range(count)]
    finish = [""] * count
    rows = list(range(count))  # the sequence in each row of the batch
    for i in range(options.max_new_tokens):
        with stats.stage("sample"):
            chosen = sample(logits, options.sampling, [generators[b] for b in rows])
        for b, token in zip(rows, chosen.tolist(), strict=True):
            if token in eos:
                finish[b] = "stop"
                continue
            tokens[b].append(token)
            if texts[b].push(token):
                finish[b] = "stop"
        if i == 0:
            stats.ttft_s = time.perf_counter() - begin
        if i + 1 == options.max_new_tokens:
            break
        for row in session.full():
            finish[rows[row]] = finish[rows[row]] or "context"
        stay = [row for row, b in enumerate(rows) if not finish[b]]
        if not stay:
            break
        if len(stay) < len(rows):
            session.keep(stay)
            chosen, rows = chosen[stay], [rows[row] for row in stay]
        logits = session.step(chosen)
    stats.new_tokens = sum(map(len, tokens))
    stats.total_s = time.perf_counter() - begin
    stats.kv_bytes = session.kv_bytes
    return [
        Generation(text.finish(), tokens[b], prompt_tokens[b], finish[b] or "length", session.reads[b], stats)
        for b, text in enumerate(texts)
    ]
