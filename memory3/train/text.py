"""Plain text as training data: sequences of a token stream, cut into chunks that each retrieve one reference.

Memory3, arXiv 2407.01178, section 3.5: a chunk attends to its own reference and those of the four chunks before it;
the slots are shared, so a sequence of 2,048 tokens reads 32 references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import MemoryConfig
from ..embed import SupportsEncode
from .batch import Piece, Sample
from .files import whole
from .overlap import TRAINING_LIMIT, refused

if TYPE_CHECKING:
    from ..bank import Bank
    from ..model.tokenizer import Tokenizer

CANDIDATES = 10  # references looked at per chunk before it goes without
EMBED_BATCH = 512


def token_stream(texts: Iterable[str], tokenizer: Tokenizer, seed: int = 0) -> np.ndarray:
    """int32 [T]: the texts in an order drawn by `seed`, each followed by the end token (if there is one)."""
    texts = list(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    end = list(tokenizer.eos_ids[:1])
    parts = tokenizer.encode_batch([texts[i] for i in order])
    return np.array([t for part in parts for t in (*part, *end)], dtype=np.int32)


def cut_sequences(stream: np.ndarray, length: int) -> np.ndarray:
    """int32 [N, length]; the tail that fills no sequence is dropped. Raises ValueError when there is not even one."""
    count = len(stream) // length
    if not count:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one sequence of {length}; use more text")
    return stream[: count * length].reshape(count, length)


def pick(total: int, step: int, batch: int, seed: int) -> list[int]:
    """Which of `total` items step number `step` takes: every epoch is a permutation of its own, whatever the batch."""
    chosen = []
    for i in range(step * batch, (step + 1) * batch):
        chosen.append(int(_epoch(total, i // total, seed)[i % total]))
    return chosen


_epochs: dict[tuple[int, int, int], np.ndarray] = {}


def _epoch(total: int, epoch: int, seed: int) -> np.ndarray:
    key = (total, epoch, seed)
    if key not in _epochs:
        if len(_epochs) > 4:
            _epochs.clear()
        _epochs[key] = np.random.default_rng([seed, epoch]).permutation(total)
    return _epochs[key]


class TextSource:
    """Sequences without memory: every token after the opening is predicted."""

    def __init__(self, sequences: np.ndarray, batch: int, seed: int, opening: Sequence[int] = ()) -> None:
        self.sequences, self.batch, self.seed = sequences, batch, seed
        self.opening = tuple(opening)

    def samples(self, step: int) -> list[Sample]:
        return [self.sample(i) for i in pick(len(self.sequences), step, self.batch, self.seed)]

    def sample(self, index: int) -> Sample:
        ids = (*self.opening, *map(int, self.sequences[index]))
        return Sample(ids, max(1, len(self.opening)))


class ChunkedSource(TextSource):
    """Sequences whose chunks read references: `retrieved` int32 [N, chunks] are numbers in `records`, -1 none."""

    def __init__(
        self,
        sequences: np.ndarray,
        batch: int,
        seed: int,
        memory: MemoryConfig,
        records: Sequence[bytes],
        retrieved: np.ndarray,
    ) -> None:
        super().__init__(sequences, batch, seed, memory.context_bos_ids)
        chunks = -(-sequences.shape[1] // memory.chunk)
        if retrieved.shape != (len(sequences), chunks):
            raise ValueError(f"retrieved: expected [{len(sequences)}, {chunks}], got {list(retrieved.shape)}")
        self.memory, self.records, self.retrieved = memory, records, retrieved

    def sample(self, index: int) -> Sample:
        plain = super().sample(index)
        numbers = self.retrieved[index].tolist()
        pieces = []
        for c in range(len(numbers)):
            near = [n for n in numbers[max(0, c + 1 - self.memory.refs) : c + 1] if n >= 0]
            end = min(len(plain.ids), len(self.opening) + (c + 1) * self.memory.chunk)
            pieces.append(Piece(end, tuple(self.records[n] for n in dict.fromkeys(near))))
        return Sample(plain.ids, plain.first, tuple(pieces))


def retrieve_for_chunks(
    sequences: np.ndarray,
    chunk: int,
    bank: Bank,
    embedder: SupportsEncode,
    decode: Callable[[Sequence[int]], str],
    *,
    limit: float = TRAINING_LIMIT,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[bytes], np.ndarray]:
    """One reference per chunk: the most similar that does not overlap its sequence by more than `limit`.

    Returns the bank's record ids and numbers in them, int32 [N, chunks], -1 where none of the CANDIDATES will do.
    cache: an .npz file that holds the answer, used when sequences and bank are the same. progress(done, total).
    """
    records = list(bank.ids())
    state = hashlib.sha256(np.ascontiguousarray(sequences).tobytes())
    state.update(b"".join(sorted(records)) + f"{chunk} {limit} {embedder.name}".encode())
    key = state.hexdigest()
    if cache is not None and cache.is_file():
        with np.load(cache) as saved:
            if str(saved["key"]) == key:
                return records, saved["retrieved"]
    number = {record: i for i, record in enumerate(records)}
    tokens: dict[bytes, list[int]] = {}
    starts = range(0, sequences.shape[1], chunk)
    retrieved = np.full((len(sequences), len(starts)), -1, np.int32)
    rows = max(1, EMBED_BATCH // len(starts))
    for first in range(0, len(sequences), rows):
        part = [s.tolist() for s in sequences[first : first + rows]]
        texts = [decode(s[lo : lo + chunk]) for s in part for lo in starts]
        found = iter(bank.search(embedder.encode(texts), CANDIDATES)[0])
        for i, sequence in enumerate(part):
            for c in range(len(starts)):
                for record in next(found):
                    if record not in tokens:
                        tokens[record] = bank.token_ids(record)
                    if not refused(sequence, tokens[record], limit):
                        retrieved[first + i, c] = number[record]
                        break
        if progress is not None:
            progress(min(first + rows, len(sequences)), len(sequences))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole(cache) as partial, partial.open("wb") as file:
            np.savez(file, key=key, retrieved=retrieved)
    return records, retrieved
