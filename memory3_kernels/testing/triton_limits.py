"""What the Triton kernels may cost on every architecture, and which instructions they must be made of.

As for the CUDA kernels (cuda_limits.py), limits are decisions: a kernel that outgrows one is changed, or the limit is,
with its reason. Tensor cores have one name per generation: HMMA, HGMMA (sm_90), UTCHMMA (sm_100).
"""

from __future__ import annotations

from dataclasses import dataclass

from .cuda_limits import ASYNC_COPY, LOCAL, REGISTER_FILE

TENSOR_CORE = "(HMMA|HGMMA|UTC.*MMA)"
# One element of two bytes at a time where a row is meant.
NARROW = r"(LDG|STG)\.E\.(U16|S16)"
ATOMIC = r"(ATOM|ATOMG|ATOMS|RED)\b"
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
    absent: tuple[str, ...] = (LOCAL, NARROW, ATOMIC)

    @property
    def registers(self) -> int:
        """Per thread; hardware hands them out by eight."""
        return min(255, REGISTER_FILE // (32 * self.warps) // 8 * 8)


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
