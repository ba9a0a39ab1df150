"""Asks the kernel for the pages of records before LMDB touches them.

LMDB maps the file, and a page that is not in memory is read when it is first touched; the kernel then reads around it
as much as the device's read-ahead says. With 8 MiB (a common setting) five records of 720 KiB cost 117 MB and 160 ms,
without read-around 900 single faults and as long; asked for exactly, 3.7 MB in about 6 ms.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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
