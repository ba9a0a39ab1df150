"""What a run returns: text, what was read and when, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

from .profiling import span

PROFILED = ("embed", "search", "load", "sample")  # stages that are no pass of the model: whole in a profile


@dataclass
class ChunkRead:
    """The memories one chunk of one sequence read.

    where: "prompt" or "generated"; [start, end): tokens of it, the opening not counted; in a chat, prompt tokens count
    on from turn to turn. scores: cosine similarity of the query; mass: mean share of attention each memory got over
    mass_rows tokens (empty if not collected).
    """

    where: str
    start: int
    end: int
    ids: list[bytes]
    scores: list[float]
    query: str = ""
    mass: list[float] = field(default_factory=list)
    mass_rows: int = 0

    def again(self, where: str, start: int, end: int) -> ChunkRead:
        """The same memories, read by a later chunk."""
        return ChunkRead(where, start, end, self.ids, self.scores, self.query)

    def to_dict(self) -> dict:
        return {**asdict(self), "ids": [i.hex() for i in self.ids]}


@dataclass
class Stats:
    """Of one `generate` call (the whole batch). Seconds, bytes, tokens.

    prompt_tokens: rows that were prefilled (openings, and the references of "rag", included).
    ttft_s: from the call to the first token (retrieval and prefill included). kv_bytes: key-values held per sequence
    when it ended, memories included. bytes_loaded: record bytes read into slots. retrievals: queries searched for.
    steps: decode passes. times: seconds by stage (what a prefetch does overlaps with "decode"). profile: the same
    time again by what was computed, every second once (`memory3.profiling`); empty unless it was asked for.
    """

    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    kv_bytes: int = 0
    bytes_loaded: int = 0
    retrievals: int = 0
    steps: int = 0
    times: dict[str, float] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of the batch over the whole time, prefill included (the paper's throughput)."""
        return self.new_tokens / self.total_s if self.total_s else 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `times[name]`."""
        begin = time.perf_counter()
        try:
            with span(name) if name in PROFILED else nullcontext():
                yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begin

    def to_dict(self) -> dict:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


@dataclass
class Generation:
    """One sequence's answer. finish: "stop" (end token or stop text), "length", or "context" (no room left).

    loss: nats per token of the text that was to be scored, if one was given.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish: str
    reads: list[ChunkRead]
    stats: Stats
    loss: float | None = None

    def to_dict(self) -> dict:
        """For JSON: record ids as hex."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "finish": self.finish,
            "reads": [read.to_dict() for read in self.reads],
            "stats": self.stats.to_dict(),
            "loss": self.loss,
        }
