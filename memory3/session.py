"""A batch in flight: its key-value cache, the memories its chunks read (chunks.py), and when they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .chunks import Piece, cut
from .generation import ChunkRead, Stats
from .memory import MemoryRead

if TYPE_CHECKING:
    from .engine import Engine


class Found(NamedTuple):
    """What a query retrieved: slots are pinned, best first."""

    slots: list[int]
    ids: list[bytes]
    scores: list[float]
    query: str

    def read(self, where: str, start: int, end: int) -> ChunkRead:
        return ChunkRead(where, start, end, self.ids, self.scores, self.query)


@dataclass(eq=False)
class Track:
    """One sequence: what it read so far, its present set of slots (pinned), its tokens since the last retrieval."""

    reads: list[ChunkRead] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    since: list[int] = field(default_factory=list)
    prompt_tokens: int = 0


class Session:
    """B sequences and their state; `feed` takes prompt tokens, `step` one generated token each.

    Use as a context manager: leaving it gives the pinned slots back.
    """

    def __init__(self, engine: Engine, batch: int, capacity: int, overflow: str = "error", collect_mass: bool = False):
        self.engine = engine
        self.stats = Stats(batch=batch)
        self.collect_mass = collect_mass
        self.cache = engine.model.new_cache(batch, capacity, memory=engine.reads_memory, overflow=overflow)
        self._all = [Track() for _ in range(batch)]
        self._rows = list(self._all)  # sequences still running, in the order of the cache's rows
        self._read: MemoryRead | None = None  # their present sets as operands of `decode`
        self._generated = 0
        self._ended_bytes = 0
        self._prefetch: tuple[list[Track], Future[list[Found]]] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Unpins every slot; the session can no longer be stepped."""
        self._drop_prefetch()
        self._release(self._rows)

    @property
    def reads(self) -> list[list[ChunkRead]]:
        """Per sequence, in order of time."""
        return [track.reads for track in self._all]

    # ---- prompt ----------------------------------------------------------------------------------------------------

    def feed(self, prompts: Sequence[Sequence[int]], openings: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Runs prompt tokens through the model; logits fp32 [B, V] after the last token of each.

        Args:
            prompts: token ids per sequence.
            openings: tokens put before each prompt that belong to no query (the context BOS).

        Raises:
            ContextFull: no room. With overflow="error" nothing was changed then.
            SlotsExhausted: one chunk per sequence already needs more slots than the arena has.
        """
        engine = self.engine
        openings = openings or [()] * len(prompts)
        lengths = [len(o) + len(p) for o, p in zip(openings, prompts, strict=True)]
        if 0 in lengths:
            raise ValueError("prompts: expected at least one token in each, got an empty one")
        if self.cache.overflow == "error":
            self.cache.make_room(lengths)  # refuses now, before anything is retrieved
        self._drop_prefetch()
        self.stats.prompt_tokens += sum(lengths)
        pieces = [
            cut(len(p), engine.chunk, engine.min_query, bool(track.reads)) or [Piece(0, 0, False)]
            for track, p in zip(self._rows, prompts, strict=True)
        ]
        logits: Tensor | None = None
        room = self._pieces_per_pass(lengths, max(map(len, openings)))
        for first in range(0, max(map(len, pieces)), room):
            part = [p[first : first + room] for p in pieces]
            new = self._feed_pieces(prompts, part, openings if first == 0 else [()] * len(prompts))
            active = torch.tensor([bool(p) for p in part])
            logits = new if logits is None else torch.where(active[:, None], new, logits)
        self._generated = 0
        for track, prompt in zip(self._rows, prompts, strict=True):
            track.since.clear()
            track.prompt_tokens += len(prompt)
        return logits

    def _pieces_per_pass(self, lengths: list[int], opening: int) -> int:
        """How many pieces of each prompt fit one forward pass: the arena and a sliding cache bound them."""
        engine, cache = self.engine, self.cache
        room = max(lengths)
        if any(have + new > cache.limit for have, new in zip(cache.lengths, lengths, strict=True)):
            fixed = cache.prefix_len + len(engine.model.memory.context_bos_ids) + opening
            room = (cache.limit - fixed) // engine.chunk
        if engine.reads_memory:
            room = min(room, engine.arena.slots // max(1, engine.refs * len(lengths)))
        return max(1, room)

    def _feed_pieces(self, prompts, part: list[list[Piece]], openings) -> Tensor:
        """One pass over some pieces of every prompt (none of a prompt that is through)."""
        asking = [
            (track, list(prompt[p.start : p.end]))
            for track, prompt, pieces in zip(self._rows, prompts, part, strict=True)
            for p in pieces
            if p.asks and self.engine.reads_memory
        ]
        # A silent piece is the last of its prompt, so who asks at all asks first and no longer needs the old set.
        self._release(dict.fromkeys(track for track, _ in asking))
        found = self._retrieve([tokens for _, tokens in asking])
        spare = [f.slots for f in found]
        answers = iter(found)
        rows, sets, lengths, owners = [], [], [], []
        try:
            for track, prompt, pieces, opening in zip(self._rows, prompts, part, openings, strict=True):
                rows.append([*opening, *(t for p in pieces for t in prompt[p.start : p.end])])
                for i, piece in enumerate(pieces):
                    if self.engine.reads_memory:
                        answer = next(answers) if piece.asks else None
                        self._note_prompt_read(track, piece, answer)
                        track.slots = track.slots if answer is None else answer.slots
                        owners.append(track.reads[-1] if track.reads else None)
                    sets.append(track.slots)
                    lengths.append(piece.end - piece.start + (len(opening) if i == 0 else 0))
            read = self._operands(sets, lengths)
            logits = self._prefill(rows, read)
        finally:  # of a prompt's sets only the last stays in use
            held = {id(track.slots) for track in self._rows}
            self._unpin(slots for slots in spare if id(slots) not in held)
        if self.collect_mass and read is not None:
            _note_chunk_mass(read, lengths, owners)
        self._refresh()
        return logits

    @staticmethod
    def _note_prompt_read(track: Track, piece: Piece, answer: Found | None) -> None:
        start, end = track.prompt_tokens + piece.start, track.prompt_tokens + piece.end
        if answer is not None:
            track.reads.append(answer.read("prompt", start, end))
        elif piece.start == 0 and track.reads:  # a short next prompt: the memories of before, a read of its own
            track.reads.append(track.reads[-1].again("prompt", start, end))
        elif track.reads:
            track.reads[-1].end = end

    def _prefill(self, rows: list[list[int]], read: MemoryRead | None, every_row: bool = False) -> Tensor:
        """Appends tokens to the cache; logits after each sequence's last token, or after every token."""
        tokens = torch.tensor([t for r in rows for t in r], dtype=torch.int64)
        wanted = torch.arange(len(tokens)) if every_row else None
        with self.stats.stage("prefill"):
            return self.engine.model.net.prefill(tokens, offsets(map(len, rows)), self.cache, read, rows=wanted)

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
            answers: token ids per sequence, at least one each; forgotten again (unless the cache had to slide).
            logits: what `feed` returned: they predict each first token.
        """
        rows = [list(a) for a in answers]
        before = list(self.cache.lengths)
        after = self._prefill(rows, self._operands([t.slots for t in self._rows], map(len, rows)), every_row=True)
        scores, begin = [], 0
        for b, row in enumerate(rows):
            predicting = torch.cat([logits[b : b + 1], after[begin : begin + len(row) - 1]])
            scores.append(predicting.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).squeeze(1))
            begin += len(row)
        if self.cache.lengths == [n + len(row) for n, row in zip(before, rows, strict=True)]:
            self.cache.lengths = before
        return scores

    # ---- generated tokens ------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Takes one new token per sequence, int64 [B]; logits fp32 [B, V] for the one after it."""
        self._generated += 1
        if self.engine.reads_memory:
            self._advance(tokens.tolist())
        with self.stats.stage("decode"):
            logits = self.engine.model.net.decode(tokens, self.cache, self._read)
        self.stats.steps += 1
        for row, track in enumerate(self._rows if self.engine.reads_memory else ()):
            if track.reads:
                if self.collect_mass:
                    _add_mass(track.reads[-1], self._read.mass[row : row + 1])
                track.reads[-1].end = self._generated + 1  # the token that this pass predicts
        return logits

    def full(self) -> list[int]:
        """Rows that cannot take another token (none where the cache may slide)."""
        cache = self.cache
        return [b for b, n in enumerate(cache.lengths) if n >= cache.limit] if cache.overflow == "error" else []

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order; the others have ended."""
        before = self._bytes_in_use()
        stay = [self._rows[row] for row in rows]
        self._release(track for track in self._rows if track not in stay)
        self._rows, self.cache = stay, self.cache.keep(rows)
        self._ended_bytes += before - self._bytes_in_use()
        self._refresh()

    def _advance(self, tokens: list[int]) -> None:
        """Counts the new tokens of every row; changes the memories when a chunk is full."""
        engine = self.engine
        for track, token in zip(self._rows, tokens, strict=True):
            track.since.append(token)
            if self._generated == 1 and track.reads:  # the first generated chunk inherits
                track.reads.append(track.reads[-1].again("generated", 0, 1))
        count = len(self._rows[0].since)
        if count == engine.chunk:
            self._change_memories()
        elif engine.prefetch and count == engine.chunk - engine.prefetch:
            queries = [list(track.since) for track in self._rows]
            self._prefetch = list(self._rows), engine.background.submit(self._retrieve, queries)

    def _change_memories(self) -> None:
        if self._prefetch is None:
            self._release(self._rows)
            asked, found = self._rows, self._retrieve([track.since for track in self._rows])
        else:
            asked, future = self._prefetch
            with self.stats.stage("wait for prefetch"):
                found = future.result()
            self._prefetch = None
            self._release(self._rows)
        for track, answer in zip(asked, found, strict=True):
            if track not in self._rows:  # ended while its memories were fetched
                self._unpin([answer.slots])
                continue
            track.slots = answer.slots
            track.reads.append(answer.read("generated", self._generated, self._generated))
            track.since.clear()
        self._refresh()

    # ---- memories --------------------------------------------------------------------------------------------------

    def _retrieve(self, queries: list[list[int]]) -> list[Found]:
        """One search and one load for all queries."""
        if not queries:
            return []
        engine, stats = self.engine, self.stats
        ids, scores, texts = engine.search(queries, stats)
        with stats.stage("load"):
            slots, loaded = engine.load(ids)
        stats.bytes_loaded += loaded
        return [Found(*answer) for answer in zip(slots, ids, scores, texts, strict=True)]

    def _operands(self, sets: list[list[int]], lengths: Iterable[int]) -> MemoryRead | None:
        """One set of slots per chunk of `lengths` rows."""
        if not self.engine.reads_memory:
            return None
        arena, refs = self.engine.arena, self.engine.refs
        slots = torch.tensor([[*s, *[-1] * (refs - len(s))] for s in sets], dtype=torch.int32).view(len(sets), refs)
        return MemoryRead(arena.kv, arena.length, slots, offsets(lengths), arena.bias, collect_mass=self.collect_mass)

    def _refresh(self) -> None:
        self._read = self._operands([track.slots for track in self._rows], [1] * len(self._rows))

    def _drop_prefetch(self) -> None:
        """Waits for memories that nobody will read and lets go of them; that they failed no longer matters."""
        if self._prefetch is not None:
            _, future = self._prefetch
            self._prefetch = None
            if future.exception() is None:
                self._unpin(found.slots for found in future.result())

    def _release(self, tracks: Iterable[Track]) -> None:
        for track in tracks:
            slots, track.slots = track.slots, []
            self._unpin([slots])

    def _unpin(self, sets: Iterable[list[int]]) -> None:
        for slots in sets:
            if slots:
                self.engine.arena.release(slots)

    def _bytes_in_use(self) -> int:
        slots = sum(len(track.slots) for track in self._rows)
        return self.cache.nbytes + (slots * self.engine.arena.slot_bytes if slots else 0)

    @property
    def kv_bytes(self) -> int:
        """Key-value bytes per sequence: cache rows and the memories in reach, now or when the sequence ended."""
        return (self._ended_bytes + self._bytes_in_use()) // max(1, len(self._all))


def offsets(lengths: Iterable[int]) -> Tensor:
    """int32 [n + 1]: where each of n runs begins and the last one ends."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _note_chunk_mass(read: MemoryRead, lengths: list[int], owners: list[ChunkRead | None]) -> None:
    """Attention mass of prompt chunks (a silent piece counts to the chunk whose memories it keeps)."""
    for chunk, rows in zip(owners, read.mass.split(lengths), strict=True):
        if chunk is not None:
            _add_mass(chunk, rows)


def _add_mass(chunk: ChunkRead, rows: Tensor) -> None:
    """Running mean over the rows [n, R] of a chunk."""
    if not len(rows):
        return
    new = rows[:, : len(chunk.ids)].mean(0).tolist()
    before, seen = chunk.mass or [0.0] * len(new), chunk.mass_rows
    chunk.mass_rows += len(rows)
    chunk.mass = [m + (x - m) * len(rows) / (seen + len(rows)) for m, x in zip(before, new, strict=True)]
