"""scatter_memory: writes records into slots of an arena, in place (docs/ops/scatter_memory.md).

arena[slots[n]] = records[n]   for n = 0, 1, ...   slot -1 skips its record; of equal slots the last one stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ._checks import check_range, expect_dtype, expect_shape

SCHEMA = "(Tensor(a!) arena, Tensor records, Tensor slots) -> ()"
MAX_DIMS = 8


def _check(arena: Tensor, records: Tensor, slots: Tensor) -> None:
    torch._check(
        1 <= arena.dim() <= MAX_DIMS,
        lambda: f"arena: expected shape [S, ...] of at most {MAX_DIMS} dimensions, got {list(arena.shape)}",
    )
    expect_shape("records", records, -1, *arena.shape[1:])
    expect_dtype("records", records, arena.dtype)
    expect_shape("slots", slots, records.shape[0])
    expect_dtype("slots", slots, torch.int32)


def fake(arena: Tensor, records: Tensor, slots: Tensor) -> None:
    _check(arena, records, slots)


def reference(arena: Tensor, records: Tensor, slots: Tensor) -> None:
    _check(arena, records, slots)
    check_range("slots", slots, -1, arena.shape[0] - 1)
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0:
            arena[slot].copy_(records[n])


def _sample(slots, shape, wanted, padded=False, dtype_override=None):
    def make(dtype: torch.dtype, generator: torch.Generator):
        dtype = dtype_override or dtype

        def draw(*size):
            if dtype.is_floating_point:
                return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
            return torch.randint(0, 100, size, generator=generator).to(dtype)

        arena = draw(slots, *shape)
        if padded:  # slots further apart than a record is long, as in the arena
            arena = torch.cat([arena.flatten(1), draw(slots, 24)], 1)[:, : arena[0].numel()].unflatten(1, shape)
        return (arena, draw(len(wanted), *shape), torch.tensor(wanted, dtype=torch.int32)), {}

    return make


def cases():
    yield Case("S5_L2_H3_K4_D24", _sample(5, (2, 2, 3, 4, 24), [3, -1, 0]))
    yield Case("S4-padded-slots", _sample(4, (2, 3, 8), [2, 0], padded=True))
    yield Case("S3-same-slot-last-stays", _sample(3, (2, 8), [1, 1, 2, 1]))
    yield Case("S6-one-number-each", _sample(6, (), [5, 0]))
    yield Case("S3-codes", _sample(3, (2, 2, 1, 112), [2, 0], dtype_override=torch.uint8))
    yield Case("S3-lengths", _sample(3, (), [2, 1], dtype_override=torch.int32))
    yield Case("N0", _sample(2, (2, 8), []))
    yield Case("S0", _sample(0, (2, 8), [-1]))
    yield Case(
        "smollm2_S64_N32", _sample(64, (15, 2, 3, 8, 64), list(range(0, 64, 2)), padded=True), slow=True, bench=True
    )


def bad_cases():
    def broken(position: int, value: Tensor):
        def make():
            args = [torch.zeros(3, 2, 8), torch.zeros(2, 2, 8), torch.tensor([0, 1], dtype=torch.int32)]
            args[position] = value
            return tuple(args), {}

        return make

    yield BadCase("shape", broken(1, torch.zeros(2, 2, 16)), r"records: expected shape \[\*, 2, 8\], got \[2, 2, 16\]")
    yield BadCase("dtype", broken(1, torch.zeros(2, 2, 8).half()), "records: expected .*[fF]loat")
    yield BadCase("slots-dtype", broken(2, torch.tensor([0, 1])), "slots: expected .*[iI]nt")
    yield BadCase(
        "slots-count", broken(2, torch.zeros(3, dtype=torch.int32)), r"slots: expected shape \[2\], got \[3\]"
    )
    for name, value in (("high", 3), ("low", -2)):
        bad = torch.tensor([0, value], dtype=torch.int32)
        yield BadCase(f"slot-{name}", broken(2, bad), rf"slots\[1\]: expected -1..2, got {value}", fake=False)


def cost(arena: Tensor, records: Tensor, slots: Tensor) -> Cost:
    return Cost(2 * records.nbytes + slots.nbytes, 0)


OP = register(
    Op(
        name="scatter_memory",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0},
        mutates=(0,),
    )
)


def scatter_memory(arena: Tensor, records: Tensor, slots: Tensor) -> None:
    """Writes records into slots of an arena, in place (docs/ops/scatter_memory.md).

    Args:
        arena: [S, ...], any dtype and strides, at most 8 dimensions; changed in place. The slots of dense records
            [S, Lm, 2, Hm, K, D] or codes [S, Lm, 2, Hm, G], their biases, or one number per slot.
        records: [N, ...], the same trailing shape and dtype, any strides. Must not overlap the arena in memory.
        slots: [N] int32: where each record goes; -1 skips it. Of records for the same slot the last one stays.

    Raises:
        RuntimeError: shapes or dtypes do not match, a slot lies outside -1..S-1 (nothing is written then), or an
            argument requires a gradient.
    """
    return OP(arena, records, slots)
