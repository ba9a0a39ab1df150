"""The engine: prompts in, text out, with memories retrieved every 64 tokens, with references as text, or with neither."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arena import Arena
from .generation import Generation, Stats
from .model.cache import ContextFull
from .sampling import Sampling, sample
from .session import Session
from .streaming import Detokenizer, stream_pieces

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
        slots: memories kept in RAM, the bound of the cache (default 256, at least what one step of `generate` needs).
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
        stop: Sequence[str] = (),
        overflow: str = "error",
        collect_mass: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        ignore_eos: bool = False,
    ) -> Generation | list[Generation]:
        """Continues one prompt or a batch of them.

        Args:
            prompts: a text, several texts, or several lists of token ids (a chat template already applied).
            max_new_tokens: per sequence.
            sampling: `Sampling(temperature=..., top_k=..., top_p=..., seed=...)`; None is greedy.
            stop: texts at which a sequence ends (cut off from its text).
            overflow: a full context raises ContextFull ("error") or drops the oldest tokens ("slide").
            collect_mass: also report how much attention each memory got (slows decoding a little).
            on_text: called as `on_text(sequence, piece)` with every piece of text as it is generated.
            ignore_eos: go on after the end token (for timing runs of fixed length).

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
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        results = self._run(ids, max_new_tokens, sampling or Sampling(), tuple(stop), overflow, collect_mass, on_text,
                            ignore_eos)  # fmt: skip
        return results[0] if single else results

    def stream(self, prompt: str | Sequence[int], **options) -> Iterator[str]:
        """Yields the text of one prompt piece by piece; options as in `generate`."""
        prompts = prompt if isinstance(prompt, str) else [prompt]
        yield from stream_pieces(lambda on_text: self.generate(prompts, on_text=on_text, **options))

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], answers: Sequence[str], overflow: str = "error") -> list[float]:
        """Mean loss in nats per token of each answer after its prompt; memories are fixed before the answer begins."""
        ids = [self._encode(p) for p in prompts]
        targets = [self.model.tokenizer.encode(a) for a in answers]
        prompt_ids, opening = self._with_references(ids, Stats())
        rows = max(len(p) + len(t) for p, t in zip(prompt_ids, targets, strict=True)) + len(opening)
        with Session(self, len(ids), self._capacity(rows), overflow) as session:
            logits = session.feed(prompt_ids, opening)
            return [-float(s.mean()) for s in session.score(targets, logits)]

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ValueError("prompt: expected some text, got an empty prompt")
        return tokens

    def _capacity(self, rows: int) -> int:
        """Cache rows for `rows` context tokens: the prefix comes on top; no more than the model has positions for."""
        memory = self.model.memory
        extra = memory.prefix_len if self.reads_memory else 0
        taken = memory.span if self.reads_memory else 0
        return max(extra + 1, min(rows + extra, self.model.config.max_context - taken))

    def _opening(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The context BOS, unless the prompt (a chat template's) already begins with it."""
        bos = self.model.memory.context_bos_ids
        return () if tuple(prompt[: len(bos)]) == bos else bos

    def _with_references(self, ids: list[list[int]], stats: Stats) -> tuple[list[list[int]], tuple[int, ...]]:
        """Prompts and the opening all of them get; in "rag" mode the references stand in front, as text."""
        if self.mode == "rag":
            from .rag import with_references

            return with_references(self, ids, stats), ()
        openings = [self._opening(p) for p in ids]
        if len(set(openings)) == 1:
            return ids, openings[0]
        return [[*o, *p] for o, p in zip(openings, ids, strict=True)], ()

    @torch.inference_mode()
    def _run(self, ids, max_new_tokens, sampling, stop, overflow, collect_mass, on_text, ignore_eos):
        begin = time.perf_counter()
        prepared = Stats()
        prompts, opening = self._with_references(ids, prepared)
        rows = max(map(len, prompts)) + len(opening) + max_new_tokens
        with Session(self, len(ids), self._capacity(rows), overflow, collect_mass) as session:
            session.stats.times.update(prepared.times)
            session.stats.retrievals = prepared.retrievals
            logits = session.feed(prompts, opening)
            return self.write_on(session, logits, [len(p) for p in ids], begin, max_new_tokens, sampling, stop, on_text,
                                 ignore_eos)  # fmt: skip

    def write_on(
        self,
        session: Session,
        logits: Tensor,
        prompt_tokens: Sequence[int],
        begin: float,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """The decoding loop of a session whose prompts are fed; `begin` is when the call started (perf_counter)."""
        tokenizer, generator, stats = self.model.tokenizer, sampling.generator(), session.stats
        count = len(prompt_tokens)
        texts = [Detokenizer(tokenizer, stop, partial(on_text, b) if on_text else None) for b in range(count)]
        tokens: list[list[int]] = [[] for _ in range(count)]
        finish = [""] * count
        for i in range(max_new_tokens):
            with stats.stage("sample"):
                chosen = sample(logits, sampling, generator)
            if i == 0:
                stats.ttft_s = time.perf_counter() - begin
            for b, token in enumerate(chosen.tolist()):
                if finish[b]:
                    continue
                if token in tokenizer.eos_ids and not ignore_eos:
                    finish[b] = "stop"
                    continue
                tokens[b].append(token)
                if texts[b].push(token):
                    finish[b] = "stop"
            if all(finish) or i + 1 == max_new_tokens:
                break
            try:
                logits = session.step(chosen)
            except ContextFull:
                finish = [f or "context" for f in finish]
                break
        stats.new_tokens = sum(map(len, tokens))
        stats.total_s = time.perf_counter() - begin
        stats.kv_bytes = session.kv_bytes
        return [
            Generation(texts[b].finish(), tokens[b], prompt_tokens[b], finish[b] or "length", session.reads[b], stats)
            for b in range(count)
        ]
