"""An iterator that another thread runs ahead of."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
AHEAD = 4  # items made before they are asked for


@contextmanager
def in_background(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """The items in order; an error of theirs is raised where the item it came instead of is asked for."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> bool:
        while not ended.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - handed over to whoever waits
            put((None, error))

    def taken() -> Iterator[T]:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        ended.set()
        thread.join()
