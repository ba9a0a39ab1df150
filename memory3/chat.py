"""Conversations through the model's own chat template; the key-values of earlier turns are kept, not recomputed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .decoding import Options, write_on
from .engine import Engine
from .generation import Generation, Stats
from .model.cache import ContextFull
from .sampling import Sampling
from .session import Session


class Chat:
    """One conversation on an engine. With memory every turn is a prompt of its own, cut and retrieved for as such (one
    that adds fewer than `min_query` tokens keeps the memories of the turn before).

    Args:
        engine: in mode "memory" or "none" ("rag" puts text before the first turn only and is not offered here).
        system: system message, or None for the template's default.
        capacity: cache rows for the whole conversation (default: all the positions the model has).
        overflow: "error": a full context raises ContextFull; "slide": the oldest turns fall out of the cache.
    """

    def __init__(
        self, engine: Engine, system: str | None = None, *, capacity: int | None = None, overflow: str = "error"
    ) -> None:
        if engine.mode == "rag":
            raise ValueError('engine: expected mode "memory" or "none" for a chat, got "rag"')
        self.engine, self.overflow = engine, overflow
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
        self._capacity = engine.capacity(capacity or engine.model.config.max_context)
        self._session: Session | None = None
        self._fed: list[int] = []  # tokens whose key-values were put into the cache, the opening not counted
        self._opening: tuple[int, ...] = ()

    @torch.inference_mode()
    def send(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
        collect_mass: bool = False,
    ) -> Generation:
        """One user turn and the model's answer; both are remembered.

        Raises:
            ContextFull: the turn does not fit (overflow="error"); the conversation stays as it was.
            ValueError: the checkpoint has no chat template, or a bad option.
        """
        begin = time.perf_counter()
        options = Options(max_new_tokens, sampling or Sampling(), on_text=on_text)
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.engine.model.tokenizer.chat(messages)
        session, new = self._session_for(tokens)
        session.stats, session.collect_mass = Stats(batch=1), collect_mass
        first_read = len(session.reads[0])
        try:
            logits = session.feed([new], None if self._fed else [self._opening])
            answer = write_on(session, logits, [len(new)], begin, options)[0]
        except BaseException as error:
            if isinstance(error, ContextFull) and self.overflow == "error":  # nothing was fed
                raise ContextFull(f"{error}; or start a new Chat") from None
            self.close()  # interrupted halfway: what the cache holds is no longer known
            raise
        # The last sampled token was never fed; everything before it was.
        self._fed = tokens + answer.token_ids[: session.stats.steps]
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        answer.reads = session.reads[0][first_read:]
        return answer

    def _session_for(self, tokens: Sequence[int]) -> tuple[Session, list[int]]:
        """The session to go on with, and the tokens it has not seen.

        The answer's text may tokenize differently inside the template than it was generated: then the cache is
        rewound to where both agree. After a slide rows and tokens no longer match, so only an exact continuation is
        possible; otherwise the conversation is fed again from its start.
        """
        session = self._session
        if session is not None:
            shared = 0
            limit = min(len(self._fed), len(tokens) - 1)  # at least one token must be fed to get logits
            while shared < limit and self._fed[shared] == tokens[shared]:
                shared += 1
            intact = session.context_rows == len(self._opening) + len(self._fed)
            if intact and shared:
                session.rewind(len(self._opening) + shared)
                self._fed = self._fed[:shared]
                return session, list(tokens[shared:])
            if shared == len(self._fed):
                return session, list(tokens[shared:])
            session.close()
        self._fed, self._opening = [], self.engine.opening(tokens)
        self._session = Session(self.engine, 1, self._capacity, self.overflow)
        return self._session, list(tokens)

    def close(self) -> None:
        """Gives the memories in use back to the engine's cache."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._fed = []
