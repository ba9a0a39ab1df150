"""The rival: the same references as text in front of the prompt, retrieved once (Memory3, section 7.5, "RAG").

Each reference is put exactly as the model meets it when it writes a memory (prefix tokens, then the reference), so
that text and memory differ in nothing but the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .generation import ChunkRead, Stats

if TYPE_CHECKING:
    from .engine import Engine


def with_references(
    engine: Engine, prompts: Sequence[Sequence[int]], stats: Stats
) -> tuple[list[list[int]], list[ChunkRead]]:
    """For each prompt what goes in front of its opening (prefix, reference, ..., prefix, reference), and what was read.

    The query is the first chunk of the prompt; the most similar reference stands last, next to the question.
    """
    ids, scores, texts = engine.search([p[: engine.chunk] for p in prompts], stats)
    prefix, bank = engine.model.memory.prefix_ids, engine.bank
    fronts = [[t for record in reversed(found) for t in (*prefix, *bank.token_ids(record))] for found in ids]
    reads = [
        ChunkRead("prompt", 0, len(prompt), *hit) for prompt, *hit in zip(prompts, ids, scores, texts, strict=True)
    ]
    return fronts, reads
