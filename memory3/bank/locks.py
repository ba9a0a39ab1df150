"""Who may write, who may open, and when the memory map may be replaced."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BankLocked, BankReadOnly

OPEN_LOCK, WRITER_LOCK = "open.lock", "writer.lock"


class WriterLock:
    """Exclusive flock on `writer.lock`; the holder's pid, host and start time are inside for the refused."""

    def __init__(self, folder: Path):
        path = folder / WRITER_LOCK
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BankReadOnly(f"cannot write to the bank {folder}: {error.strerror}; open it for reading") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self._fd, 1000, 0).decode(errors="replace")
            os.close(self._fd)
            raise BankLocked(
                f"the bank {folder} has a writer already: {_holder(text)}. One writer at a time; wait for it or "
                "stop it, or open the bank for reading (any number of readers may run beside a writer)"
            ) from None
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(about).encode(), 0)
        except OSError:  # a full disk: the lock holds without a name on it, and deleting must stay possible
            return

    def release(self) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f"process {int(about['pid'])} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not named itself yet"


class Gate:
    """Many transactions at once, or one remap alone. A waiting remap holds new transactions back."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._inside = 0
        self._alone: int | None = None
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: self._alone is None and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1
                self._change.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._change:
            self._waiting += 1
            self._change.wait_for(lambda: self._alone is None and not self._inside)
            self._waiting -= 1
            self._alone = threading.get_ident()
        try:
            yield
        finally:
            with self._change:
                self._alone = None
                self._change.notify_all()


@contextmanager
def open_lock(folder: Path, exclusive: bool = False) -> Iterator[None]:
    """Held shared while files are being opened, exclusively while compaction swaps them."""
    try:
        fd = os.open(folder / OPEN_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # read-only file system: nothing can be swapped there either
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)
