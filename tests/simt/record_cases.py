"""Sample calls for the CUDA kernels that write records and decode coded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from memory3_kernels._registry import OPS, Case
from memory3_kernels.ops import gather_dequantize as decode
from memory3_kernels.ops import gather_memory as gather
from memory3_kernels.ops import scatter_memory as scatter
from memory3_kernels.ops import select_tokens as select
from memory3_kernels.ops import vq_dequantize as vq


def apart(make: Callable, *positions: int, gap: int) -> Callable:
    """The same call with `gap` elements between the rows of some arguments."""

    def made(dtype: torch.dtype, generator: torch.Generator):
        args, kwargs = make(dtype, generator)
        args = list(args)
        for i in positions:
            wide = torch.zeros(*args[i].shape[:-1], args[i].shape[-1] + gap, dtype=args[i].dtype)
            wide[..., : args[i].shape[-1]] = args[i]
            args[i] = wide[..., : args[i].shape[-1]]
        return tuple(args), kwargs

    return made


def gather_memory(only: int | None) -> Iterator[Case]:
    yield from (case for case in gather.cases() if not case.slow)
    strided = gather._sample(3, 7, 2, only or 64, 8, 0.3)
    yield Case("rows-apart", apart(strided, 0, 1, gap=16))
    yield Case("rows-at-odd-places", apart(strided, 1, gap=2))
    yield Case("rows-longer-than-a-block", gather._sample(1, 3, 1, 4096, 2))


def scatter_memory(only: int | None) -> Iterator[Case]:
    yield from (case for case in scatter.cases() if not case.slow)
    yield Case("several-pieces", scatter._sample(3, (3, 2, 2, 8, only or 64), [2, -1, 0], padded=True))
    yield Case("several-runs", apart(scatter._sample(4, (2, 5, 8, 24), [1, 3]), 0, gap=8))
    yield Case("runs-at-odd-places", apart(scatter._sample(4, (2, 3, 24), [1, 3]), 1, gap=2))
    yield Case("many-for-one-slot", scatter._sample(3, (2, 8), [1, 2, *[1] * 70, 0, *[2] * 40]))
    yield Case("numbers-of-8-bytes", scatter._sample(5, (), [3, 0, 3], dtype_override=torch.int64))


# The least number of vectors of which a warp has two tiles, where blocks set up something (vq_dequantize/heuristics.h).
TWO_TILES = 132 * 4 * 64 + 1


def vq_dequantize(only: int | None) -> Iterator[Case]:
    yield Case("D80_b14_PQ8x10", vq._sample((37,), 80, 14, 8, 10))
    yield Case("D80_b6_PQ8x10-no-rotation", vq._sample((67,), 80, 6, 8, 10, rotate=False))
    yield Case("D80_b9_PQ20x5-grid", vq._sample((3, 2, 16), 80, 9, 20, 5, half_tables=True))
    yield Case("codes-apart", apart(vq._sample((21,), 80, 5, 8, 7), 0, gap=3))
    yield Case("one-vector", vq._sample((), 80, 4, 40, 6))
    yield Case("N0", vq._sample((0,), 80, 4, 2, 4))
    yield Case("D24_b4_PQ3x13-no-rotation", vq._sample((19,), 24, 4, 3, 13, rotate=False))
    yield Case("D256_b7_PQ64x4-no-rotation", vq._sample((18,), 256, 7, 64, 4, rotate=False, half_tables=True))
    yield Case("two-tiles-per-warp", vq._sample((TWO_TILES + 60,), 24, 4, 3, 4, rotate=False, half_tables=True))
    if not only:
        # The least number of vectors for which a fine table of 16 entries per part lies in shared memory.
        yield Case("table-in-shared-memory", vq._sample((16899,), 24, 4, 3, 4, rotate=False, half_tables=True))
        yield Case("D64_b5_PQ8x7-grid", vq._sample((2, 3, 5), 64, 5, 8, 7))
        yield Case("D128_b8_PQ16x8", vq._sample((33,), 128, 8, 16, 8))
        yield Case("D128_b8_PQ16x8-fp16-tables", vq._sample((9,), 128, 8, 16, 8, half_tables=True))


def gather_dequantize(only: int | None) -> Iterator[Case]:
    yield Case("S5_H2_K8_D80_b6_PQ8x10-view", decode._sample(5, [4, -1, 0, 4], 2, 8, 80, 6, 8, 10, view=True))
    yield Case("S3_H1_K4_D80_b6_PQ4x8", decode._sample(3, [2, 1, 2], 1, 4, 80, 6, 4, 8, half_tables=True))
    yield Case("no-rotation", decode._sample(4, [1, 0, -1, 3], 3, 8, 80, 5, 8, 10, rotate=False))
    yield Case("runs-of-odd-bytes", decode._sample(2, [1, -1, 0], 3, 3, 24, 5, 3, 6, rotate=False))
    yield Case("R0", decode._sample(2, [], 2, 4, 80, 4, 2, 4))
    yield Case("S0", decode._sample(0, [-1], 2, 4, 80, 4, 2, 4))
    # 64 vectors a record; the last ones, which are second tiles, are there and not, the other way round than the first.
    there = [n % 2 - 1 for n in range(TWO_TILES // 64)]
    yield Case("two-tiles-per-warp", decode._sample(1, [*there, 0, -1, 0], 1, 64, 24, 4, 3, 4, rotate=False))
    if not only:
        yield Case("S9_H2_K8_D128_b8_PQ16x8", decode._sample(9, [8, 0, -1], 2, 8, 128, 8, 16, 8))
        yield Case("S3_H1_K4_D64_b6_PQ4x8", decode._sample(3, [2, 1], 1, 4, 64, 6, 4, 8))


def select_tokens(only: int | None) -> Iterator[Case]:
    dim, other = only or 64, only or 128
    for rule in select.RULES:
        yield Case(f"{rule}-T40_H6-2", select._sample(2, 40, 6, 2, dim, 8, rule))
        lengths = [37, 0, 2, 3, 4, 8, 20]
        yield Case(f"{rule}-lengths-start", select._sample(7, 37, 3, 3, 80, 5, rule, start=3, lengths=lengths))
        yield Case(f"{rule}-two-chunks_T150", select._sample(1, 150, 2, 1, dim, 9, rule, start=3))
    yield Case("received-group5_T128", select._sample(1, 128, 5, 1, 80, 8, "received"))
    yield Case("causal-group5_T136_start6", select._sample(1, 136, 5, 1, 80, 8, "causal", start=6, lengths=[133]))
    # An odd number: of one pair of equal rows only one is kept.
    yield Case("received-twins-across-tiles_T130", select._sample(2, 130, 6, 2, dim, 15, "received", twins=True))
    yield Case("causal-keeps-all_T80_K128", select._sample(2, 80, 3, 1, other, 128, "causal", start=3))
    yield Case("exp-flat_T19", select._sample(1, 19, 2, 1, other, 4, "exp", flat=True))
    yield Case("received-many-rows_T300", select._sample(1, 300, 1, 1, dim, 20, "received"))
    yield Case("received-start-past-everything", select._sample(2, 6, 2, 1, 80, 3, "received", start=6))
    yield Case("received-N0", select._sample(0, 8, 2, 1, 80, 3, "received"))
    yield Case("received-T0", select._sample(2, 0, 2, 1, 80, 3, "received"))


@dataclass(frozen=True)
class Stream:
    """A call at the paper's shape, and the kinds of instruction (as the PTX interpreter calls them) that carry its
    operands: rows, codes and results, not indices and tables."""

    op: str
    case: Case
    kinds: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.op}-{self.case.id}"

    def least(self, *args, **kwargs) -> int:
        """Bytes of the tile schedule (docs/ops/<op>.md), tables left out."""
        return OPS[self.op].cost(*args, **kwargs).bytes - self._tables(*args)

    def _tables(self, *args) -> int:
        if not self.op.endswith("dequantize"):
            return 0
        *operands, coarse, fine, rot = args
        vectors = operands[0].numel() // 14
        if len(operands) == 2:
            vectors = operands[1].numel() * operands[0][0].numel() // 14
        entries = sum(min(t.nbytes, vectors * t.shape[0] * t.shape[2] * t.element_size()) for t in (coarse, fine))
        return entries + (0 if rot is None else rot.nbytes)


def streams(dims: tuple[int, ...]) -> Iterator[Stream]:
    copies, queued = ("global_load", "global_store"), ("async_copy", "global_store")
    for dim in dims:
        yield Stream("gather_memory", Case(f"D{dim}", gather._sample(4, 128, 8, dim, 8)), copies)
        yield Stream("scatter_memory", Case(f"D{dim}", scatter._sample(6, (3, 2, 8, 8, dim), [4, 1, 0])), copies)
        select_call = select._sample(1, 128, 10, 2, dim, 8, "received")
        yield Stream("select_tokens", Case(f"received-D{dim}", select_call), ("async_copy",))
        prefixed = select._sample(1, 134, 10, 2, dim, 8, "causal", start=6)
        yield Stream("select_tokens", Case(f"causal-D{dim}", prefixed), ("async_copy",))
        for half in (False, True):
            for rotate in (False, True):
                book, options = (dim, 14, 8, 10), {"rotate": rotate, "half_tables": half}
                name = f"D{dim}-{'fp16' if half else 'fp32'}-tables" + ("" if rotate else "-no-rotation")
                yield Stream("vq_dequantize", Case(name, vq._sample((1040,), *book, **options)), queued)
                yield Stream("gather_dequantize", Case(
                    name, decode._sample(20, list(range(15)), 8, 8, *book, view=True, **options)), queued)  # fmt: skip
