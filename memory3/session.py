"""A batch in flight: its key-value cache, the memories its chunks read, and when they change.

The chunk rule (Memory3, arXiv 2407.01178, section 3.1; what the paper leaves open is fixed here):
  - prompt: every 64 tokens are their own query and read their own memories; a last piece of fewer than `min_query`
    tokens keeps the memories of the piece before it (the first piece always asks);
  - generated: the first chunk inherits the last prompt chunk's memories; after every 64 generated tokens the old ones
    are dropped and those 64 tokens are the query for the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .generation import ChunkRead, Stats
from .memory import MemoryRead
from .model.cache import KVCache

if TYPE_CHECKING:
    from .engine import Engine


def cut(tokens: int, chunk: int, min_query: int, has_previous: bool) -> list[tuple[int, int, bool]]:
    """Pieces (start, end, asks) of a prompt: 64 tokens each, the last maybe shorter and then maybe silent."""
    pieces = []
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        asks = end - start >= min(min_query, chunk) or (start == 0 and not has_previous)
        pieces.append((start, end, asks))
    return pieces


class Session:
    """B sequences and their state; `feed` takes prompt tokens, `step` one generated token each.

    Use as a context manager: leaving it gives the pinned slots back.
    """

    def __init__(self, engine: Engine, batch: int, capacity: int, overflow: str = "error", collect_mass: bool = False):
        self.engine = engine
        self.stats = Stats(batch=batch)
        self.reads: list[list[ChunkRead]] = [[] for _ in range(batch)]
        model = engine.model
        self.cache = KVCache(model.config, batch, capacity, model.dtype, overflow=overflow)
        if engine.reads_memory:
            self.cache.start(model.prefix)
        self._collect_mass = collect_mass
        self._slots: list[list[int]] = [[] for _ in range(batch)]  # each sequence's present set, pinned
        self._read: MemoryRead | None = None  # the same set as operands of `decode`
        self._since: list[list[int]] = [[] for _ in range(batch)]  # tokens generated since the last retrieval
        self._prompt_tokens = [0] * batch
        self._generated = 0
        self._mass_rows = 0
        self._prefetched: Future | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Unpins every slot; the session can no longer be stepped."""
        self._drop_prefetched()
        self._release(self._slots)
        self._slots = [[] for _ in self._slots]

    # ---- prompt ----------------------------------------------------------------------------------------------------

    def feed(self, prompts: Sequence[Sequence[int]], opening: Sequence[int] = ()) -> Tensor:
        """Runs prompt tokens through the model; logits fp32 [B, V] after the last token of each.

        Args:
            prompts: token ids per sequence, at least one each.
            opening: tokens put before each prompt that belong to no query (the context BOS).

        Raises:
            ContextFull: no room (with overflow="error").
            SlotsExhausted: one chunk per sequence already needs more slots than the arena has.
        """
        if any(len(p) + len(opening) == 0 for p in prompts):
            raise ValueError("prompts: expected at least one token in each, got an empty one")
        self.stats.prompt_tokens += sum(map(len, prompts))
        self._drop_prefetched()
        self._generated = 0
        if not self.engine.reads_memory:
            with self.stats.stage("prefill"):
                return self._prefill([[*opening, *p] for p in prompts], None)
        pieces = [
            cut(len(p), self.engine.chunk, self.engine.min_query, bool(self.reads[b])) or [(0, 0, False)]
            for b, p in enumerate(prompts)
        ]
        # As many pieces per pass as the arena can hold at once: long prompts take several passes.
        room = max(1, self.engine.arena.slots // max(1, self.engine.refs * len(prompts)) - 1)
        logits: Tensor | None = None
        for first in range(0, max(map(len, pieces)), room):
            part = [p[first : first + room] for p in pieces]
            new = self._feed_pieces(prompts, part, opening if first == 0 else ())
            active = torch.tensor([bool(p) for p in part])
            logits = new if logits is None else torch.where(active[:, None], new, logits)
        self._since = [[] for _ in prompts]
        self._prompt_tokens = [n + len(p) for n, p in zip(self._prompt_tokens, prompts, strict=True)]
        return logits

    def _feed_pieces(self, prompts, part, opening) -> Tensor:
        queries = [
            (b, start, end, list(prompts[b][start:end]))
            for b, pieces in enumerate(part)
            for start, end, asks in pieces
            if asks
        ]
        slots, hits, texts = self._retrieve([tokens for *_, tokens in queries])
        found = iter(zip(queries, slots, hits, texts, strict=True))
        rows, sets, lengths, owners = [], [], [], []
        for b, pieces in enumerate(part):
            rows.append([])
            for i, (start, end, asks) in enumerate(pieces):
                tokens = list(prompts[b][start:end])
                if i == 0:
                    tokens = [*opening, *tokens]
                if asks:
                    (_, start, end, _), new, (ids, scores), text = next(found)
                    self._release([self._slots[b]] if i == 0 else [])
                    offset = self._prompt_tokens[b]
                    self.reads[b].append(ChunkRead("prompt", offset + start, offset + end, ids, scores, text))
                    current = new
                else:
                    current = sets[-1] if i > 0 else self._slots[b]
                    if self.reads[b]:
                        self.reads[b][-1].end = self._prompt_tokens[b] + end
                rows[b] += tokens
                lengths.append(len(tokens))
                sets.append(current)
                owners.append((b, self.reads[b][-1] if self.reads[b] else None))
            if pieces:
                self._slots[b] = sets[-1]
        read = self._operands(sets, lengths)
        with self.stats.stage("prefill"):
            logits = self._prefill(rows, read)
        if self._collect_mass:
            self._note_chunk_mass(read, lengths, owners)
        held = [id(s) for s in self._slots]
        self._release([s for s in {id(s): s for s in sets}.values() if id(s) not in held])
        self._use_slots()
        return logits

    def _prefill(self, rows: list[list[int]], read: MemoryRead | None) -> Tensor:
        cu = [0]
        for r in rows:
            cu.append(cu[-1] + len(r))
        tokens = torch.tensor([t for r in rows for t in r], dtype=torch.int64)
        return self.engine.model.net.prefill(tokens, torch.tensor(cu, dtype=torch.int32), self.cache, read)

    def rewind(self, rows: int) -> None:
        """Forgets all but the first `rows` context rows (prefix not counted) of a session of one sequence."""
        keep = self.cache.prefix_len + rows
        if self.cache.batch != 1 or not self.cache.prefix_len <= keep <= self.cache.lengths[0]:
            raise ValueError(f"rows: expected 0 to {self.cache.lengths[0] - self.cache.prefix_len}, got {rows}")
        self.cache.lengths[0] = keep

    @property
    def context_rows(self) -> int:
        """Context rows (prefix not counted) of the first sequence."""
        return self.cache.lengths[0] - self.cache.prefix_len

    def score(self, answers: Sequence[Sequence[int]], logits: Tensor) -> list[Tensor]:
        """Log-probabilities of each answer's tokens, read with the memories of the prompt's last chunk.

        Args:
            answers: token ids per sequence, at least one each; they are appended to the cache.
            logits: what `feed` returned: they predict each first token.
        """
        rows = [list(a) for a in answers]
        lengths = [len(a) for a in rows]
        read = self._operands(self._slots, lengths) if self.engine.reads_memory else None
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tokens = torch.tensor([t for r in rows for t in r], dtype=torch.int64)
        after = self.engine.model.net.prefill(tokens, cu, self.cache, read, rows=torch.arange(len(tokens)))
        scores = []
        for b, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            predicting = torch.cat([logits[b : b + 1], after[begin : end - 1]])
            scores.append(predicting.log_softmax(-1).gather(1, tokens[begin:end, None]).squeeze(1))
        return scores

    # ---- generated tokens ------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Takes one new token per sequence, int64 [B]; logits fp32 [B, V] for the one after it."""
        engine = self.engine
        if engine.reads_memory:
            if self._generated == 0:
                self._inherit()
            for since, token in zip(self._since, tokens.tolist(), strict=True):
                since.append(token)
            self._generated += 1
            if len(self._since[0]) == engine.chunk:
                self._change_memories()
            elif engine.prefetch and len(self._since[0]) == engine.chunk - engine.prefetch:
                self._prefetched = engine.background.submit(self._retrieve, [list(s) for s in self._since])
        with self.stats.stage("decode"):
            logits = engine.model.net.decode(tokens, self.cache, self._read)
        self.stats.steps += 1
        if engine.reads_memory:
            for b, reads in enumerate(self.reads):
                if reads:
                    reads[-1].end = self._generated
                    if self._collect_mass:
                        self._note_row_mass(reads[-1], b)
            self._mass_rows += 1
        return logits

    def _inherit(self) -> None:
        """The first generated chunk reads what the last prompt chunk read: a read of its own in the record."""
        for reads in self.reads:
            if reads:
                last = reads[-1]
                reads.append(ChunkRead("generated", 0, 0, last.ids, last.scores, last.query))
        self._mass_rows = 0

    def _change_memories(self) -> None:
        if self._prefetched is not None:
            with self.stats.stage("wait for prefetch"):
                slots, hits, texts = self._prefetched.result()
            self._prefetched = None
        else:
            slots, hits, texts = self._retrieve([list(s) for s in self._since])
        self._release(self._slots)
        self._slots = slots
        self._use_slots()
        for b, ((ids, scores), text) in enumerate(zip(hits, texts, strict=True)):
            begin = self._generated - 1
            self.reads[b].append(ChunkRead("generated", begin, begin, ids, scores, text))
            self._since[b].clear()
        self._mass_rows = 0

    # ---- memories --------------------------------------------------------------------------------------------------

    def _retrieve(self, queries: list[list[int]]):
        """Pinned slots, (ids, scores) and query text of each query; one search and one load for all."""
        if not queries:
            return [], [], []
        engine, stats = self.engine, self.stats
        texts = [engine.model.tokenizer.decode(q, skip_special=True) for q in queries]
        with stats.stage("embed"):
            vectors = engine.embedder.encode(texts)
        with stats.stage("search"):
            ids, scores = engine.bank.search(vectors, engine.refs)
        with stats.stage("load"):
            slots, loaded = engine.load(ids)
        stats.bytes_loaded += loaded
        stats.retrievals += len(queries)
        hits = [(list(i), [float(s) for s in row]) for i, row in zip(ids, scores, strict=True)]
        return slots, hits, texts

    def _operands(self, sets: list[list[int]], lengths: list[int]) -> MemoryRead:
        arena, refs = self.engine.arena, self.engine.refs
        slots = torch.full((len(sets), refs), -1, dtype=torch.int32)
        for c, chosen in enumerate(sets):
            slots[c, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        cu_chunk = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return MemoryRead(arena.kv, arena.length, slots, cu_chunk, arena.bias, collect_mass=self._collect_mass)

    def _use_slots(self) -> None:
        self._read = self._operands(self._slots, [1] * len(self._slots))

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._release(self._prefetched.result()[0])
            self._prefetched = None

    def _release(self, sets: list[list[int]]) -> None:
        for chosen in sets:
            self.engine.arena.release(chosen)

    def _note_chunk_mass(self, read: MemoryRead, lengths: list[int], owners) -> None:
        begin = 0
        for (_, chunk), n in zip(owners, lengths, strict=True):
            if chunk is not None and n and not chunk.mass:
                chunk.mass = read.mass[begin : begin + n, : len(chunk.ids)].mean(0).tolist()
            begin += n

    def _note_row_mass(self, chunk: ChunkRead, b: int) -> None:
        """Running mean over the rows of a generated chunk."""
        row = self._read.mass[b, : len(chunk.ids)].tolist()
        seen = self._mass_rows
        before = chunk.mass or [0.0] * len(row)
        chunk.mass = [(m * seen + x) / (seen + 1) for m, x in zip(before, row, strict=True)]

    @property
    def kv_bytes(self) -> int:
        """Key-value bytes per sequence: cache rows in use and the memories in reach."""
        held = sum(len(s) for s in self._slots) * self.engine.arena.kv[0].nbytes if self.engine.reads_memory else 0
        return (self.cache.nbytes + held) // max(1, self.cache.batch)
