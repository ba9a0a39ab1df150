"""The bar of a run: step, loss, tokens per second, time left. Where stderr is no terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 30


class Progress:
    """show: False says nothing."""

    def __init__(self, show: bool = True) -> None:
        self._show = show
        self._bar: Any = None
        self._task: Any = None
        self._last = self._began = 0.0
        self._first = self._steps = 0

    @contextmanager
    def started(self, step: int, steps: int) -> Iterator[None]:
        """Around the loop, which begins at `step` of `steps`."""
        self._first, self._steps, self._began = step, steps, time.monotonic()
        if not self._show:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        with RichProgress(*columns, left, console=console, disable=not console.is_terminal) as bar:
            self._bar, self._task = bar, bar.add_task("", total=steps, completed=step)
            yield

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """After a step."""
        if self._bar is None:
            return
        text = f"loss {values['loss']:.3f}  {values['tokens_per_s']:.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._last > LINE_SECONDS:
            self._last = now
            left = (now - self._began) / max(1, step - self._first) * (self._steps - step)
            self._bar.console.print(f"step {step}/{self._steps}  {text}  {_time(left)} left")

    def note(self, step: int, found: Mapping[str, float]) -> None:
        """After an evaluation."""
        if self._bar is not None:
            self._bar.console.print(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))


def left(say: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    """For work without a bar: told how many are done, it says now and then how many and how long the rest takes."""
    began = last = time.monotonic()

    def done(count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > LINE_SECONDS:
            last = now
            say(f"{count} of {total} {what}, {_time((now - began) / count * (total - count))} left")

    return done


def _time(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{int(seconds % 60):02d}"
