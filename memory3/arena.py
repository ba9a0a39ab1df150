"""The arena: one block of slots that the attention ops read in place, and a bounded cache of records in it.

A layer view `kv[:, l, 0]` is the `mem_k` of that layer: moving a record into a slot is the only copy between disk and
attention (CONTRACT of the record format: docs/architecture.md).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memory3_kernels import pages


class RecordSource(Protocol):
    """What fills slots: a bank, or anything with its `read_into`."""

    def read_into(self, ids: Sequence[bytes], kv: Tensor, length: Tensor, slots: Sequence[int], bias=None) -> int: ...


class SlotsExhausted(RuntimeError):
    """A step needs more memories at once than the arena has slots."""


@dataclass
class CacheStats:
    hits: int = 0
    misses: int = 0
    bytes_loaded: int = 0


ALIGNMENT = 256  # bytes: of the first slot, and of the distance between two


def _aligned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros [S, ...]; slots are contiguous in themselves, and as far apart as ALIGNMENT asks."""
    slot = math.prod(shape[1:])
    unit = ALIGNMENT // dtype.itemsize
    stride = -(-slot // unit) * unit
    raw = pages.zeros((shape[0] * stride + unit,), dtype)
    start = -raw.data_ptr() % ALIGNMENT // dtype.itemsize
    return raw[start : start + shape[0] * stride].view(shape[0], stride)[:, :slot].unflatten(1, tuple(shape[1:]))


class Arena:
    """S slots of [Lm, 2, Hm, K, D], and a least-recently-used map from record ids to them.

    Args:
        shape: one record, [Lm, 2, Hm, K, D].
        slots: S, the bound of the cache.
        dtype: of the key-values; the model's.
        has_bias: also keep fp32 [S, Lm, Hm, K] score biases.

    Slots in use by a running step are pinned; only unpinned slots are evicted. May be used from several threads.
    """

    def __init__(self, shape: Sequence[int], slots: int, dtype: torch.dtype, has_bias: bool = False) -> None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        layers, _, heads, tokens, _ = shape
        with torch.inference_mode(False):  # inference tensors could not be filled by a thread outside of that mode
            self.kv = _aligned((slots, *shape), dtype)
            self.length = torch.zeros(slots, dtype=torch.int32)
            self.bias = torch.zeros((slots, layers, heads, tokens), dtype=torch.float32) if has_bias else None
        self.stats = CacheStats()
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # oldest use first
        self._free = list(range(slots - 1, -1, -1))
        self._pins = [0] * slots
        self._guard = threading.RLock()

    @property
    def slots(self) -> int:
        return self.kv.shape[0]

    @property
    def slot_bytes(self) -> int:
        """Key-value bytes of one record in its slot."""
        return self.kv[0].nbytes

    @property
    def pinned(self) -> int:
        """Slots in use."""
        return sum(pins > 0 for pins in self._pins)

    def __contains__(self, record: bytes) -> bool:
        return record in self._slot_of

    def load(self, ids: Sequence[bytes], source: RecordSource) -> list[int]:
        """Slots holding these records, in order, each pinned once per mention; missing ones are read from `source`.

        Raises:
            SlotsExhausted: the distinct records do not fit beside those already pinned. Nothing stays pinned.
            Whatever `source.read_into` raises. Nothing stays pinned, and no half-read record is kept.
        """
        with self._guard:
            return self._load(ids, source)

    def _load(self, ids: Sequence[bytes], source: RecordSource) -> list[int]:
        wanted, in_use = list(dict.fromkeys(ids)), self.pinned
        missing = [record for record in wanted if record not in self._slot_of]
        for record in wanted:
            if record in self._slot_of:
                self._slot_of.move_to_end(record)
                self._pins[self._slot_of[record]] += 1
        fresh: list[int] = []
        try:
            for _ in missing:
                fresh.append(self._take_slot(len(wanted), in_use))
            if missing:
                self.stats.bytes_loaded += source.read_into(missing, self.kv, self.length, fresh, self.bias)
        except BaseException:
            self._free.extend(fresh)
            for record in wanted:
                if record in self._slot_of:
                    self._pins[self._slot_of[record]] -= 1
            raise
        for record, slot in zip(missing, fresh, strict=True):
            self._slot_of[record] = slot
            self._pins[slot] = 1
        self.stats.hits += len(wanted) - len(missing)
        self.stats.misses += len(missing)
        mentioned: set[bytes] = set()
        for record in ids:  # one pin per mention, so that release(slots) mirrors load(ids)
            if record in mentioned:
                self._pins[self._slot_of[record]] += 1
            mentioned.add(record)
        return [self._slot_of[record] for record in ids]

    def release(self, slots: Sequence[int]) -> None:
        """Takes back one pin of each slot that `load` returned."""
        with self._guard:
            for slot in slots:
                if self._pins[slot] <= 0:
                    raise ValueError(f"slot {slot} is not pinned: release mirrors load, once each")
                self._pins[slot] -= 1

    def clear(self) -> None:
        """Forgets every unpinned record (the next load reads it again)."""
        with self._guard:
            for record, slot in list(self._slot_of.items()):
                if not self._pins[slot]:
                    del self._slot_of[record]
                    self._free.append(slot)

    def _take_slot(self, needed: int, in_use: int) -> int:
        if self._free:
            return self._free.pop()
        for record, slot in self._slot_of.items():
            if not self._pins[slot]:
                del self._slot_of[record]
                return slot
        raise SlotsExhausted(
            f"slots: a step reads {needed} memories at once beside {in_use} in use, "
            f"but the arena has {self.slots} slots; raise slots, or lower refs or the batch"
        )
