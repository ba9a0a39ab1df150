"""CPU memory on huge pages, for what is read again and again: weights, caches, memory records.

With pages of 4 KiB every record head begins a page of its own, and each new page costs a walk through the page tables
(two of them under virtualisation), more than reading what lies on it. Hardware prefetchers stop at their ends, too.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page; 2 MiB on x86-64 and on most of arm64
REGION = 16 << 20  # smaller requests are cut from regions of so many bytes
LINE = 64

_guard = threading.Lock()
_region: tuple[Tensor, int] | None = None  # the one being cut, and how much of it is gone


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of zeros that begins a cache line; on huge pages where the system has any to give.

    Physical memory is taken when it is first written to. Small tensors share a region, which lives as long as any of
    them: what is to be copied or pickled by itself does not belong here, its copy would be one of the region.
    """
    size = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(False):  # an inference tensor could not be filled by a thread outside of that mode
        if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
            return torch.zeros(tuple(shape), dtype=dtype)
        return _cut(size).view(dtype).view(tuple(shape))


def _cut(size: int) -> Tensor:
    global _region
    taken = -(-size // LINE) * LINE
    if taken > REGION // 2:
        return _map(taken)[:size]
    with _guard:
        if _region is None or _region[1] + taken > REGION:
            _region = _map(REGION), 0
        whole, at = _region
        _region = whole, at + taken
    return whole[at : at + size]


def _map(size: int) -> Tensor:
    """uint8 zeros from the beginning of a huge page on."""
    area = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them
    whole = torch.frombuffer(area, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE :][:size]
