"""Asks the kernel for the pages of records before LMDB touches them, and maps them at once when it does.

LMDB maps the file, and a page that is not in memory is read when it is first touched; the kernel then reads around it
as much as the device's read-ahead says. With 8 MiB (a common setting) five records of 720 KiB cost 117 MB and 160 ms,
without read-around 900 single faults and as long; asked for exactly, 3.7 MB in about 6 ms.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BankTruncated
from .lmdbfile import places


def announce(path: Path, database: str, keys: Sequence[bytes]) -> None:
    """Starts reading the large values of these keys; returns at once. A hint: what cannot be found is left out."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with open(path, "rb") as file:
            # The walk to the values reads single pages: as many read-arounds would bring in 100 MB.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for offset, size in places(file, path, database, keys):
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
    except (OSError, BankTruncated):
        return  # whoever reads the values will say what is wrong


POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
WORTH_MAPPING = 1 << 16  # bytes


def map_pages(value: Any) -> None:
    """Maps a value's pages in one call: a fault for each costs as much as copying it (40 records of 720 KiB that were
    in memory but not touched before: 23 ms without, 14 with). A hint, as above."""
    if len(value) < WORTH_MAPPING or (advise := _madvise()) is None:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first = np.frombuffer(value, np.uint8).ctypes.data
    begin = first // page * page
    advise(begin, first + len(value) - begin, POPULATE_READ)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
