"""Warm start: write a whole corpus into a bank, in batches that are each committed at once.

A killed build is run again with the same arguments: ids are made from content, so batches that are in the bank
are skipped, and batches are cut from the corpus alike every time, so the bank ends up the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Entry
from ..embed import SupportsEncode, as_embedder
from ..memory import Memory
from .codec import Codec, train_codec
from .corpus import Chunk, pack_all
from .env import DATA_FILE
from .errors import BankError, IdentityMismatch
from .store import Bank

Write = Callable[[list[list[int]], list[str]], list[Memory]]
Progress = Callable[[int, int], None]  # references done, references in all
CODEC_SAMPLE = 1024  # references whose key-values train a codec


@dataclass(frozen=True)
class BuildReport:
    """references: different references in the corpus; written now; present: were in the bank before."""

    references: int
    written: int
    present: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.written / self.seconds if self.seconds else 0.0


def build_bank(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    model: Any,
    embedder: Any = None,
    *,
    codec: str | None = None,
    limit: int | None = None,
    batch: int = 16,
    cold: bool = False,
    progress: bool | Progress = True,
    seed: int = 0,
) -> BuildReport:
    """Cut entries into references and write them into the bank at `path`, made if it is not there.

    model     MemoryModel (its tokenizer, identity, memory.span and write_ids are used)
    embedder  an embedder (memory3.embed), None for MiniLM
    codec     FAISS spec such as "OPQ8_64,Residual2x8,PQ8x8"; trained on references drawn by `seed`; None is dense
    limit     at most this many references; cold: text and embeddings only, memories at first retrieval
    progress  True: a bar with rate and time left on the terminal; or a function of (done, total)
    Raises IdentityMismatch when a bank at `path` belongs to something else, BankFull, BankLocked.
    """
    encoder = as_embedder(embedder)
    with _bar(progress) as show:
        chunks = collect(pack_all(entries, model.tokenizer.encode_reference, model.memory.span), limit)
        if not chunks:
            raise BankError("the corpus has no text; nothing was written")
        bank = _open_or_create(Path(path), model, encoder, codec, chunks, seed)
        with bank:
            return write_chunks(bank, chunks, model.write_ids, encoder, batch=batch, cold=cold, progress=show)


def collect(chunks: Iterable[Chunk], limit: int | None = None) -> list[Chunk]:
    """Chunks in order without repeats of the same tokens, at most `limit`."""
    unique: dict[tuple[int, ...], Chunk] = {}
    for chunk in chunks:
        unique.setdefault(tuple(chunk.token_ids), chunk)
        if limit is not None and len(unique) >= limit:
            break
    return list(unique.values())


def _open_or_create(
    path: Path, model: Any, encoder: SupportsEncode, codec: str | None, chunks: Sequence[Chunk], seed: int
) -> Bank:
    identity = model.identity(embedder=encoder.name)
    if (path / DATA_FILE).is_file():
        bank = Bank.open(path, identity, write=True)
        have = bank.codec.spec.text if bank.codec else "dense"
        if codec is not None and have != codec:
            bank.close()
            raise IdentityMismatch(path, [("codec", have, codec)])
        return bank
    trained = _train(model, codec, chunks, seed) if codec is not None else None
    return Bank.create(path, identity, codec=trained)


def _train(model: Any, spec: str, chunks: Sequence[Chunk], seed: int) -> Codec:
    chosen = np.random.default_rng(seed).permutation(len(chunks))[:CODEC_SAMPLE]
    sample = [chunks[i].token_ids for i in sorted(chosen)]
    memories: list[Memory] = []
    for start in range(0, len(sample), 16):
        memories += model.write_ids(sample[start : start + 16])
    return train_codec(spec, memories, seed=seed)


def write_chunks(
    bank: Bank,
    chunks: Sequence[Chunk],
    write: Write,
    embedder: SupportsEncode,
    *,
    batch: int = 16,
    cold: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Write those chunks that the bank lacks; `write(token ids, texts)` makes memories. One commit per batch."""
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    began, written = time.monotonic(), 0
    for start in range(0, len(chunks), batch):
        part = chunks[start : start + batch]
        lacking = len(bank.missing([bank.record_id(c.token_ids) for c in part], cold=cold))
        if lacking:
            texts, tokens = [c.text for c in part], [c.token_ids for c in part]
            about = {"titles": [c.title for c in part], "sources": [c.source for c in part]}
            vectors = embedder.encode(texts)
            if cold:
                bank.add_cold(texts, tokens, vectors, **about)
            else:
                memories = [
                    replace(memory, text=text, token_ids=list(ids))
                    for memory, text, ids in zip(write(tokens, texts), texts, tokens, strict=True)
                ]
                bank.add(memories, vectors, **about)
            written += lacking
        if progress is not None:
            progress(start + len(part), len(chunks))
    bank.build_index()
    return BuildReport(len(chunks), written, len(chunks) - written, time.monotonic() - began)


@contextmanager
def _bar(progress: bool | Progress) -> Iterator[Progress | None]:
    """The caller's function, nothing, or a bar on stderr (silent where stderr is no terminal)."""
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn()]
    with RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("cutting the corpus into references", total=None, rate="")
        began: list[float] = []
        first: list[int] = []

        def show(done: int, total: int) -> None:
            began.append(time.monotonic()) if not began else None
            first.append(done) if not first else None
            spent = time.monotonic() - began[0]
            rate = f"{(done - first[0]) / spent:.1f}/s" if spent > 0.5 else ""
            bar.update(task, description="writing references", completed=done, total=total, rate=rate)

        yield show
