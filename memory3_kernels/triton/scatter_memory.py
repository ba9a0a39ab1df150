"""scatter_memory: a copy of bits; one program per block of one record. Of equal slots the last record stays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._checks import check_range
from . import _launch
from ._launch import Launch, power_of_two

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def scatter_records_kernel(
    arena, records, slots, count, capacity, blocks, size, middle, inner,
    a_slot, a_outer, a_middle, a_inner, r_record, r_outer, r_middle, r_inner, s_record,
    BLOCK: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // blocks
    slot = tl.load(slots + n.to(tl.int64) * s_record)
    later = 0
    for first in range(n + 1, count, SEEN):
        other = first + tl.arange(0, SEEN)
        same = tl.load(slots + other.to(tl.int64) * s_record, mask=other < count, other=-1) == slot
        later += tl.sum(same.to(tl.int32), 0)
    if (slot >= 0) & (slot < capacity) & (later == 0):
        block = tl.program_id(0) % blocks
        if WIDE:  # else words of 32 bits: divisions of 64 are calls, with a stack
            block = block.to(tl.int64)
        e = block * BLOCK + tl.arange(0, BLOCK)
        x, y, z = (e // inner // middle).to(tl.int64), (e // inner % middle).to(tl.int64), (e % inner).to(tl.int64)
        source = records + n.to(tl.int64) * r_record + x * r_outer + y * r_middle + z * r_inner
        target = arena + slot.to(tl.int64) * a_slot + x * a_outer + y * a_middle + z * a_inner
        tl.store(target, tl.load(source, mask=e < size), mask=e < size)


def merged_dims(shape, a_stride, r_stride) -> list[tuple[int, int, int]]:
    """(size, stride in the arena, stride in the records) of a record's dimensions, neighbours that lie back to back in
    both joined into one; outermost first."""
    dims: list[tuple[int, int, int]] = []
    for size, a, r in zip(shape, a_stride, r_stride, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * a and dims[-1][2] == size * r:
            dims[-1] = (dims[-1][0] * size, a, r)
        else:
            dims.append((size, a, r))
    return dims


def fits(tensor: Tensor, step: int, size: int) -> bool:
    """Whether `step` neighbouring elements of a record always make one of `size` bytes."""
    *outer, last = tensor.stride()
    return (
        tensor.dim() > 1  # the first dimension counts records
        and last == 1
        and tensor.shape[-1] % step == 0
        and tensor.data_ptr() % size == 0
        and all(stride % step == 0 for stride in outer)
    )


def as_bits(*tensors: Tensor) -> list[Tensor]:
    """The tensors as integers, of 8 bytes where all of them allow it."""
    tensors = tuple(torch.view_as_real(t) if t.is_complex() else t for t in tensors)
    own = tensors[0].element_size()
    size = next(n for n in (8, 4, 2, 1) if n == own or (n > own and all(fits(t, n // own, n) for t in tensors)))
    return [t.view(BITS[size]) for t in tensors]


def launches(arena: Tensor, records: Tensor, slots: Tensor) -> list[Launch]:
    dims = merged_dims(arena.shape[1:], arena.stride()[1:], records.stride()[1:])
    if len(dims) > 3:  # no arena has so many that do not join: one launch per index of the outermost
        outer = next(d for d, size in enumerate(arena.shape[1:], 1) if size != 1)
        pairs = zip(arena.unbind(outer), records.unbind(outer), strict=True)
        return [launch for a, r in pairs for launch in launches(a, r, slots)]
    dims = [(1, 0, 0)] * (3 - len(dims)) + dims
    size = dims[0][0] * dims[1][0] * dims[2][0]
    block = min(4096, power_of_two(size, 32))  # a loop-free 16 to 64 bytes per thread
    blocks = triton.cdiv(size, block)
    args = {"arena": arena, "records": records, "slots": slots, "count": slots.shape[0], "capacity": arena.shape[0]}
    args |= {"blocks": blocks, "size": size, "middle": dims[1][0], "inner": dims[2][0]}
    args |= {"a_slot": arena.stride(0), "a_outer": dims[0][1], "a_middle": dims[1][1], "a_inner": dims[2][1]}
    args |= {"r_record": records.stride(0), "r_outer": dims[0][2], "r_middle": dims[1][2], "r_inner": dims[2][2]}
    args |= {"s_record": slots.stride(0)}
    constants = {"BLOCK": block, "SEEN": 128, "WIDE": size + block >= 2**31}
    return [Launch(scatter_records_kernel, (blocks * slots.shape[0],), args, constants)]


def call(arena: Tensor, records: Tensor, slots: Tensor) -> None:
    _launch.outputs("scatter_memory", arena, records, slots)
    if _launch.checks_values():
        check_range("slots", slots, -1, arena.shape[0] - 1)
    if arena.numel() and records.numel():
        _launch.run(launches(*as_bits(arena, records), slots))
