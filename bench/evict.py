"""Out of memory with a file: the next reader gets it from the device. And how many bytes the device gave."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

MADV_DONTNEED = 4


def evict(path: str | Path) -> None:
    """Drops a file's pages from the page cache, this process's mappings of it included.

    A page that a mapping holds is not dropped, so mappings let go of theirs first. Another process's mapping still
    keeps its pages: check `device_bytes`. Raises OSError where the system has no such calls or refuses.
    """
    path = Path(path).resolve()
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise refused to let go of {path}")
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a page not yet written is kept
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def device_bytes() -> int:
    """Bytes this process has caused to be read from storage so far (`read_bytes` of /proc/self/io)."""
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes")
