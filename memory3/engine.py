"""The engine: prompts in, text out; with memories retrieved every 64 tokens, with references as text, or plain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .arena import Arena
from .decoding import Options, write_on
from .generation import ChunkRead, Generation, Stats
from .profiling import collect
from .rag import with_references
from .sampling import Sampling
from .session import Session
from .streaming import stream_pieces

if TYPE_CHECKING:
    from .bank import Bank
    from .model.load import MemoryModel

MODES = ("memory", "rag", "none")


class Engine:
    """Generates with a bank behind the model.

    Args:
        model: `memory3.load_model(...)`.
        bank: an open Bank written by the same model and memory configuration; None: the plain model.
        embedder: what the bank's references were embedded with; None: the bank's own (`memory3.embed`).
        mode: "memory" (explicit memory, the default with a bank), "rag" (the same references as text in front of the
            prompt, retrieved once), "none".
        refs: references per retrieval (default: the model's memory configuration, 5).
        slots: memories kept in RAM, the bound of the cache; at least batch x refs, with prefetch twice that.
        prefetch: search and load for the next generated chunk this many tokens early, in the background, with the
            tokens there are by then; 0 (default) is the paper's exact behaviour.

    Raises:
        ValueError: an argument is out of range.
        IdentityMismatch: the bank was written by another model, tokenizer, memory configuration or embedder.
    """

    def __init__(
        self,
        model: MemoryModel,
        bank: Bank | None = None,
        embedder=None,
        *,
        mode: str | None = None,
        refs: int | None = None,
        slots: int = 256,
        prefetch: int = 0,
    ) -> None:
        self.model, self.bank = model, bank
        self.mode = mode or ("memory" if bank is not None else "none")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if self.mode != "none" and bank is None:
            raise ValueError(f"mode {self.mode!r} needs a bank, got None: Engine(model, Bank.open(path))")
        self.chunk, self.min_query = model.memory.chunk, model.memory.min_query
        self.refs = model.memory.refs if refs is None else refs
        if self.refs < 0:
            raise ValueError(f"refs: expected 0 or more, got {refs}")
        if not 0 <= prefetch < self.chunk:
            raise ValueError(f"prefetch: expected 0 (off) to {self.chunk - 1} tokens, got {prefetch}")
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        self.prefetch = prefetch
        self._slots = slots
        self._embedder = embedder
        if bank is not None:
            bank.check(model.identity(embedder=self.embedder.name))

    @property
    def reads_memory(self) -> bool:
        return self.mode == "memory"

    @cached_property
    def embedder(self):
        if self._embedder is not None:
            return self._embedder
        from .embed import Embedder

        return Embedder()

    @cached_property
    def arena(self) -> Arena:
        return Arena(
            self.model.memory.record_shape(self.model.config), self._slots, self.model.dtype, self.bank.has_bias
        )

    @cached_property
    def background(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="memory3-prefetch")

    def search(
        self, queries: Sequence[Sequence[int]], stats: Stats
    ) -> tuple[list[list[bytes]], list[list[float]], list[str]]:
        """Record ids and similarities for each query (token ids), best first, and the query's text."""
        with stats.stage("embed"):
            texts = [self.model.tokenizer.decode(q, skip_special=True) for q in queries]
            vectors = self.embedder.encode(texts)
        with stats.stage("search"):
            ids, scores = self.bank.search(vectors, self.refs)
        stats.retrievals += len(queries)
        return [list(row) for row in ids], [[float(s) for s in row] for row in scores], texts

    def load(self, ids: list[list[bytes]]) -> tuple[list[list[int]], int]:
        """Pinned slots for each list of record ids, and the bytes that had to be read. Cold references are written."""
        flat = [record for group in ids for record in group]
        missing = [record for record in dict.fromkeys(flat) if record not in self.arena]
        self.bank.ensure(missing, self.model.write_ids)
        before = self.arena.stats.bytes_loaded
        slots = iter(self.arena.load(flat, self.bank))
        return [[next(slots) for _ in group] for group in ids], self.arena.stats.bytes_loaded - before

    # ---- text in, text out ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        overflow: str = "error",
        collect_mass: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        ignore_eos: bool = False,
        score: Sequence[str] = (),
        profile: bool = False,
    ) -> Generation | list[Generation]:
        """Continues one prompt or a batch of them.

        Args:
            prompts: a text, several texts, or several lists of token ids (a chat template already applied).
            max_new_tokens: per sequence.
            sampling: `Sampling(temperature=..., top_k=..., top_p=..., seed=...)`; None is greedy.
            stop: a text, or several, at which a sequence ends (cut off from its text).
            overflow: a full context raises ContextFull ("error") or drops the oldest tokens ("slide").
            collect_mass: also report how much attention each memory got (slows decoding a little).
            on_text: called as `on_text(sequence, piece)` with every piece of text as it is generated.
            ignore_eos: go on after the end token (for timing runs of fixed length).
            score: one text per prompt whose loss after it is reported too (`Generation.loss`), as `score` would; the
                prompt is read only once for both. Not counted in the times.
            profile: also report seconds by what was computed (`Generation.stats.profile`): embed, search, load,
                dequantise, linear, attention, other, sample, Python. Slows decoding by a few per cent.

        Returns:
            A Generation for a single text, else one per prompt, in order.

        Raises:
            ValueError: no prompt, an empty prompt, or a bad option.
            ContextFull: the prompt does not fit; during generation a sequence ends with finish="context" instead.
        """
        single = isinstance(prompts, str)
        ids = [self._encode(p) for p in ([prompts] if single else prompts)]
        if not ids:
            raise ValueError("prompts: expected at least one, got none")
        if score and len(score) != len(ids):
            raise ValueError(f"score: expected one text per prompt, {len(ids)}, got {len(score)}")
        targets = [self._encode(a, "score") for a in score]
        options = Options(max_new_tokens, sampling or Sampling(), stop, on_text, ignore_eos)
        with collect() if profile else nullcontext() as profiled:
            results = self._run(ids, options, overflow, collect_mass, targets)
        if profiled is not None:
            results[0].stats.profile = profiled.seconds
        return results[0] if single else results

    def stream(self, prompt: str | Sequence[int], **options) -> Iterator[str]:
        """Yields the text of one prompt piece by piece; options as in `generate`."""
        prompts = prompt if isinstance(prompt, str) else [prompt]
        yield from stream_pieces(lambda on_text: self.generate(prompts, on_text=on_text, **options))

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], answers: Sequence[str], overflow: str = "error") -> list[float]:
        """Mean loss in nats per token of each answer after its prompt; memories are fixed before the answer begins.

        Raises:
            ValueError: not one answer per prompt, or an empty prompt or answer.
            ContextFull: prompt and answer do not fit (overflow="error").
        """
        if len(prompts) != len(answers) or not prompts:
            raise ValueError(f"answers: expected one per prompt, at least one, got {len(answers)} for {len(prompts)}")
        ids = [self._encode(p) for p in prompts]
        targets = [self._encode(a, "answer") for a in answers]
        with self._session(ids, max(map(len, targets)), overflow) as (session, logits):
            return [-float(s.mean()) for s in session.score(targets, logits)]

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _encode(self, text: str | Sequence[int], name: str = "prompt") -> list[int]:
        tokens = self.model.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not tokens:
            raise ValueError(f"{name}: expected some text, got an empty {name}")
        return tokens

    def capacity(self, rows: int) -> int:
        """Cache rows for `rows` context tokens: the prefix comes on top; no more than the model has positions for."""
        memory = self.model.memory
        extra = memory.prefix_len if self.reads_memory else 0
        taken = memory.span if self.reads_memory else 0
        return max(extra + 1, min(rows + extra, self.model.config.max_context - taken))

    def opening(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The context BOS, unless the prompt (a chat template's) already begins with it."""
        bos = self.model.memory.context_bos_ids
        return () if tuple(prompt[: len(bos)]) == bos else bos

    @contextmanager
    def _session(self, ids: list[list[int]], new_tokens: int, overflow: str, collect_mass: bool = False):
        """A session that has read the prompts (in "rag" mode with their references in front), and its logits."""
        stats = Stats(batch=len(ids))
        openings: list[Sequence[int]] = [self.opening(p) for p in ids]
        reads: list[ChunkRead] = []
        if self.mode == "rag":
            fronts, reads = with_references(self, ids, stats)
            openings = [[*front, *opening] for front, opening in zip(fronts, openings, strict=True)]
        rows = max(len(o) + len(p) for o, p in zip(openings, ids, strict=True)) + new_tokens
        with Session(self, len(ids), self.capacity(rows), overflow, collect_mass) as session:
            session.stats = stats
            logits = session.feed(ids, openings)
            for seen, read in zip(session.reads, reads, strict=False):
                seen.append(read)
            yield session, logits

    @torch.inference_mode()
    def _run(self, ids, options: Options, overflow: str, collect_mass: bool, targets) -> list[Generation]:
        begin = time.perf_counter()
        room = max([options.max_new_tokens, *map(len, targets)])
        with self._session(ids, room, overflow, collect_mass) as (session, logits):
            fed = time.perf_counter()
            scores = session.score(targets, logits) if targets else []
            begin += time.perf_counter() - fed
            results = write_on(session, logits, [len(p) for p in ids], begin, options)
        for result, found in zip(results, scores, strict=False):
            result.loss = -float(found.mean())
        return results
