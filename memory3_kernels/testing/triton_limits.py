"""What the Triton kernels may cost on every architecture, and which instructions they must be made of.

As for the CUDA kernels (cuda_limits.py), limits are decisions: a kernel that outgrows one is changed, or the limit is,
with its reason. Tensor cores have one name per generation: HMMA, HGMMA (sm_90), UTCHMMA (sm_100).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cuda_limits import ASYNC_COPY, LOCAL, REGISTER_FILE

TENSOR_CORE = "(HMMA|HGMMA|UTC.*MMA)"
# One element of two bytes at a time where a row is meant.
NARROW = r"(LDG|STG)\.E\.(U16|S16)"
ATOMIC, SHARED_ATOMIC = r"(ATOM|ATOMG|RED)\b", r"ATOMS\b"
WIDE_LOAD, WIDE_STORE = r"LD(G\.E|GSTS\.E\S*)\.128", r"STG\.E\.128"


@dataclass(frozen=True)
class Limits:
    """Of one kernel, whatever its tiles.

    Attributes:
        warps: how many a multiprocessor must hold, by registers.
        present: regular expressions, each matching some instruction (SASS) from its start.
        absent: expressions that match none.
    """

    warps: int
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = (LOCAL, NARROW, ATOMIC, SHARED_ATOMIC)

    @property
    def registers(self) -> int:
        """Per thread; hardware hands them out by eight."""
        return min(255, REGISTER_FILE // (32 * self.warps) // 8 * 8)


# Bytes of stack per thread in float32, which is for tests and comparisons: products take three operands of twice the
# size, no tile of tensor cores is smaller than the 16 x 16 that it has, and for one more block per multiprocessor ptxas
# keeps up to eight values in local memory.
FLOAT32_STACK = 32


def asked(kernel: str, dtype: torch.dtype, arch: int) -> tuple[int, tuple[str, ...], list[str]]:
    """(bytes of stack let pass, what must be there, what must not) of a kernel in a type on an architecture. Float32
    decodes without tensor cores, and its tiles are too small for copies that run ahead. On sm_100 products lie in
    tensor memory, and what hands that out to blocks is an atomic of its own in shared memory (tcgen05.alloc)."""
    limits, exact = LIMITS[kernel], dtype is torch.float32
    let_pass = {LOCAL: exact, SHARED_ATOMIC: arch == 100}
    absent = [pattern for pattern in limits.absent if not let_pass.get(pattern)]
    return (FLOAT32_STACK if exact else 0), (() if exact else limits.present), absent


# What the PTX interpreter counts, for every kernel. Bytes a call moves, each once per launch, against its compulsory
# ones, or sectors asked for, against those of its tile schedule; bytes used of the sectors that carry the streamed
# operands; passes through shared memory, against those that the bytes need.
MOVED, EFFICIENCY, PASSES = 1.15, 0.9, 1.1

_ATTENTION = (TENSOR_CORE, ASYNC_COPY, WIDE_LOAD)

LIMITS: dict[str, Limits] = {
    # One block of 8 warps, or two of 4, whose tiles fill the registers: products are what these wait for.
    "attention_kernel": Limits(8, _ATTENTION),
    "query_gradient_kernel": Limits(8, _ATTENTION),
    "context_gradient_kernel": Limits(8, (*_ATTENTION, WIDE_STORE)),
    "record_gradient_kernel": Limits(8, _ATTENTION),
    "select_kernel": Limits(8, (TENSOR_CORE, WIDE_LOAD)),
    # Bound by memory: what is under way is in shared memory, not in warps. Two blocks of 4.
    "decode_kernel": Limits(8, (*_ATTENTION, WIDE_STORE)),
    "merge_splits_kernel": Limits(32, (WIDE_LOAD,)),
    # Gathers from codebooks: as many addresses as values.
    "dequantize_kernel": Limits(8),
    "gather_rows_kernel": Limits(48, (WIDE_LOAD, WIDE_STORE)),
    "merge_kernel": Limits(40, (WIDE_LOAD, WIDE_STORE)),
    "scatter_records_kernel": Limits(8),
}
