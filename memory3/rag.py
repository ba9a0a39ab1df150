"""The rival: the same references as text in front of the prompt, retrieved once (Memory3, section 7.5, "RAG").

Each reference is put exactly as the model meets it when it writes a memory (prefix tokens, then the reference), so
that text and memory differ in nothing but the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .generation import Stats

if TYPE_CHECKING:
    from .engine import Engine


def with_references(engine: Engine, prompts: Sequence[Sequence[int]], stats: Stats) -> list[list[int]]:
    """Prompts with their references in front: prefix, reference, ..., prefix, reference, context BOS, prompt.

    The query is the first chunk of the prompt; the most similar reference stands last, next to the question.
    """
    memory, tokenizer = engine.model.memory, engine.model.tokenizer
    with stats.stage("embed"):
        vectors = engine.embedder.encode([tokenizer.decode(p[: engine.chunk], skip_special=True) for p in prompts])
    with stats.stage("search"):
        found, _ = engine.bank.search(vectors, engine.refs)
    stats.retrievals += len(prompts)
    out = []
    for prompt, ids in zip(prompts, found, strict=True):
        rows: list[int] = []
        for record in reversed(ids):
            rows += [*memory.prefix_ids, *engine.bank.token_ids(record)]
        out.append([*rows, *engine._opening(prompt), *prompt])
    return out
