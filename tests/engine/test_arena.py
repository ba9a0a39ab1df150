"""Slots: least recently used goes first, pinned slots stay, a failed load leaves nothing behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.arena import Arena, SlotsExhausted

SHAPE = (1, 2, 1, 2, 8)


class Source:
    """Record i is filled with the number i."""

    def __init__(self, broken=()):
        self.reads, self.broken = [], set(broken)

    def read_into(self, ids, kv, length, slots, bias=None):
        for record, slot in zip(ids, slots, strict=True):
            kv[slot] = record[0]
            length[slot] = 2
            if record in self.broken:
                raise OSError("unreadable record")
            self.reads.append(record)
        return len(ids) * kv[0].nbytes


def ids(*numbers):
    return [bytes([n]) for n in numbers]


@pytest.mark.parametrize("shape", [(1, 2, 1, 2, 8), (3, 2, 3, 5, 8), (2, 2, 2, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_aligned(shape, dtype):
    """Base and slot distance are multiples of 256 bytes whatever a record's size; slots do not overlap."""
    kv = Arena(shape, 3, dtype).kv
    assert kv.shape == (3, *shape) and kv.dtype == dtype and not kv.any()
    assert kv.data_ptr() % 256 == 0 and kv.stride(0) * kv.element_size() % 256 == 0
    assert kv[0].is_contiguous() and kv[:, 0, 1].shape == (3, *shape[2:])
    for slot in range(3):
        kv[slot] = slot + 1
    assert [kv[slot].unique().tolist() for slot in range(3)] == [[1], [2], [3]]


def test_hits_do_not_read_again():
    arena, source = Arena(SHAPE, 4, torch.float32), Source()
    slots = arena.load(ids(1, 2, 1), source)
    assert slots[0] == slots[2] and slots[0] != slots[1]
    assert arena.kv[slots[1]].unique().tolist() == [2]
    arena.release(slots)
    assert arena.load(ids(2), source) == [slots[1]]
    assert source.reads == ids(1, 2)
    assert (arena.stats.hits, arena.stats.misses, arena.stats.bytes_loaded) == (1, 2, 2 * arena.kv[0].nbytes)


def test_evicts_the_least_recently_used():
    arena, source = Arena(SHAPE, 2, torch.float32), Source()
    for wanted in (1, 2, 1, 3):  # 2 is the oldest when 3 comes
        arena.release(arena.load(ids(wanted), source))
    assert ids(1)[0] in arena and ids(3)[0] in arena and ids(2)[0] not in arena


def test_pinned_slots_are_never_evicted():
    arena, source = Arena(SHAPE, 2, torch.float32), Source()
    held = arena.load(ids(1), source)
    arena.release(arena.load(ids(2), source))
    arena.release(arena.load(ids(3), source))
    assert arena.kv[held[0]].unique().tolist() == [1]
    with pytest.raises(SlotsExhausted, match="2 slots"):
        arena.load(ids(4, 5), source)
    arena.release(held)
    arena.load(ids(4, 5), source)


def test_twice_pinned_needs_two_releases():
    arena, source = Arena(SHAPE, 1, torch.float32), Source()
    slots = arena.load(ids(1, 1), source)
    arena.release(slots[:1])
    with pytest.raises(SlotsExhausted):
        arena.load(ids(2), source)
    arena.release(slots[1:])
    arena.load(ids(2), source)
    with pytest.raises(ValueError, match="not pinned"):
        arena.release(slots[:1] * 2)


def test_failed_read_leaves_nothing_behind():
    arena = Arena(SHAPE, 3, torch.float32)
    source = Source(broken=ids(2))
    arena.release(arena.load(ids(1), source))
    with pytest.raises(OSError):
        arena.load(ids(1, 3, 2), source)
    assert ids(2)[0] not in arena and ids(3)[0] not in arena
    arena.release(arena.load(ids(4, 5, 6), source))  # all three slots are free or evictable


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=30), st.integers(3, 6))
def test_what_a_slot_holds_is_what_was_asked(requests, slots):
    arena, source = Arena(SHAPE, slots, torch.float32), Source()
    for wanted in requests:
        got = arena.load(ids(*wanted), source)
        assert [int(arena.kv[s].flatten()[0]) for s in got] == wanted
        arena.release(got)
    assert len(arena._slot_of) + len(arena._free) == slots
