"""RAG that retrieves again while it generates: references appended, or in front with everything computed again.

Both retrieve for the prompt (its first chunk is the query, as in "rag" mode) and after every chunk of generated tokens
(those are the query): one retrieval less than explicit memory makes for a prompt of two chunks, in the rival's favour.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from memory3 import Engine
from memory3.generation import Stats
from memory3.rag import with_references
from memory3.sampling import Sampling, sample
from memory3.session import Session
from memory3.streaming import Detokenizer

PLACES = ("append", "front")


@torch.inference_mode()
def generate(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, place: str) -> tuple[list, Stats]:
    """Greedy, fixed length: (token ids per sequence, Stats as Engine.generate reports them).

    engine: of mode "rag". place "append": new references follow what was generated, all key-values are kept. "front":
    they replace the old ones in front of the prompt, and everything after them is computed again.
    Raises ValueError for another place, ContextFull where it does not fit.
    """
    if place not in PLACES:
        raise ValueError(f"place: expected one of {', '.join(PLACES)}, got {place!r}")
    begin = time.perf_counter()
    stats = Stats(batch=len(prompts))
    texts = [Detokenizer(engine.model.tokenizer) for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    rows = _rows(engine, prompts, new_tokens, place)
    with ExitStack() as open_sessions:
        fronts, _ = with_references(engine, prompts, stats)
        session, logits = _start(engine, prompts, fronts, rows, stats, open_sessions)
        for i in range(new_tokens):
            with stats.stage("sample"):
                chosen = sample(logits, Sampling(), [None] * len(prompts))
            for row, text, token in zip(tokens, texts, chosen.tolist(), strict=True):
                row.append(token)
                text.push(token)
            if i == 0:
                stats.ttft_s = time.perf_counter() - begin
            if i + 1 == new_tokens:
                break
            if (i + 1) % engine.chunk:
                logits = session.step(chosen)
                continue
            fronts, _ = with_references(engine, [row[-engine.chunk :] for row in tokens], stats)
            if place == "append":
                logits = session.feed([row[-1:] for row in tokens], fronts)
            else:
                open_sessions.close()
                whole = [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)]
                session, logits = _start(engine, whole, fronts, rows, stats, open_sessions)
        stats.kv_bytes = session.kv_bytes
    stats.new_tokens = sum(map(len, tokens))
    stats.total_s = time.perf_counter() - begin
    return tokens, stats


def _start(engine: Engine, texts, fronts, rows: int, stats: Stats, sessions: ExitStack):
    """A session that has read references, opening and text of every sequence, and its logits."""
    session = sessions.enter_context(Session(engine, len(texts), engine.capacity(rows)))
    session.stats = stats
    openings = [[*front, *engine.opening(text)] for front, text in zip(fronts, texts, strict=True)]
    return session, session.feed(texts, openings)


def _rows(engine: Engine, prompts, new_tokens: int, place: str) -> int:
    """Cache rows of the longest sequence, by the longest references there may be."""
    memory = engine.model.memory
    front = engine.refs * (memory.span + memory.prefix_len)
    times = 1 + (new_tokens - 1) // engine.chunk if place == "append" else 1
    return times * front + max(map(len, prompts)) + len(memory.context_bos_ids) + new_tokens
