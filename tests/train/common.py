"""Batches for the tiny model of tests/model/common.py."""

from __future__ import annotations

import random

from model.common import TINY, TINY_MEMORY

from memory3.config import MemoryConfig
from memory3.model.llama import Llama
from memory3.train.batch import Piece, Sample


def reference_tokens(record: bytes) -> list[int]:
    """A reference of 3 to 16 tokens made from its id, as a bank would give it."""
    rng = random.Random(record)
    return [rng.randrange(2, TINY.vocab_size) for _ in range(3 + record[0] % 14)]


def memory_samples(chunks=((8, 5), (8, 8, 3)), memory: MemoryConfig = TINY_MEMORY, seed: int = 0) -> list[Sample]:
    """Sequences cut into chunks of these lengths; every chunk reads its own reference and the one before it."""
    rng = random.Random(seed)
    samples = []
    for n, lengths in enumerate(chunks):
        ids = [*memory.context_bos_ids, *(rng.randrange(2, TINY.vocab_size) for _ in range(sum(lengths)))]
        pieces, end = [], len(memory.context_bos_ids)
        for c, length in enumerate(lengths):
            end += length
            pieces.append(Piece(end, tuple(bytes([i]) for i in range(max(0, n + c - 1), n + c + 1))))
        samples.append(Sample(tuple(ids), len(memory.context_bos_ids) or 1, tuple(pieces)))
    return samples


def trainable(net: Llama) -> Llama:
    return net.requires_grad_(True)
