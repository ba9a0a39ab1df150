"""Tokens to text as they come: no half characters, nothing shown that a stop text may still take back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence


class Detokenizer:
    """Collects one sequence's tokens; `on_piece` gets text that is final.

    Bytes of an unfinished character decode to U+FFFD and are held back, and so is a tail that begins a stop text.
    What a token reads as may depend on the one before it (SentencePiece drops a text's first space): new tokens are
    decoded behind the run that was settled last, and its text is taken off.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), on_piece: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self._stop, self._on_piece = tokenizer, tuple(stop), on_piece
        self._ids: list[int] = []
        self._run = self._settled = 0  # the run settled last is ids[_run:_settled]
        self._text = ""
        self._shown = 0
        self._ended = False

    def push(self, token: int) -> bool:
        """Adds a token; True when a stop text is complete (later tokens are ignored)."""
        if not self._ended:
            self._ids.append(token)
            if not self._pending().endswith("\ufffd"):
                self._settle()
                self._show(final=self._ended)
        return self._ended

    def finish(self) -> str:
        """The whole text; what was held back is shown."""
        if not self._ended:
            self._settle()
        self._ended = True
        self._show(final=True)
        return self._text

    def _pending(self) -> str:
        known = len(self._tokenizer.decode(self._ids[self._run : self._settled]))
        return self._tokenizer.decode(self._ids[self._run :])[known:]

    def _settle(self) -> None:
        self._text += self._pending()
        self._run, self._settled = self._settled, len(self._ids)
        self._cut_at_stop()

    def _cut_at_stop(self) -> None:
        found = [at for at in (self._text.find(s) for s in self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._ended = True

    def _show(self, final: bool) -> None:
        if self._on_piece is None:
            return
        end = len(self._text)
        if not final:
            held = [n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n])]
            end -= max(held, default=0)
        if end > self._shown:
            self._on_piece(self._text[self._shown : end])
            self._shown = end


def stream_pieces(generate: Callable[[Callable[[int, str], None]], object]) -> Iterator[str]:
    """Runs `generate(on_text)` in a thread and yields its pieces; its exception is raised here."""
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    done = object()
    failure: list[BaseException] = []
    abandoned = threading.Event()

    class Abandoned(Exception):
        pass

    def on_text(_: int, piece: str) -> None:
        if abandoned.is_set():
            raise Abandoned
        pieces.put(piece)

    def work() -> None:
        try:
            generate(on_text)
        except Abandoned:
            pass
        except BaseException as error:
            failure.append(error)
        pieces.put(done)

    thread = threading.Thread(target=work, name="memory3-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not done:
            yield piece
    finally:  # a caller that stops listening ends the run at its next piece
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]
