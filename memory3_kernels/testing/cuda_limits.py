"""What the CUDA kernels may cost on every architecture, and which instructions they must be made of.

Limits are decisions (how many blocks an SM should hold), not measurements: a kernel that outgrows one is changed,
or the limit is, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTER_FILE = 65536
# Bytes of shared memory one block may use (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

TENSOR_CORE, MATRIX_LOAD, ASYNC_COPY = "HMMA", "LDSM", r"LDGSTS.*\.128"
# Local memory: registers that did not fit, or an array indexed at run time.
LOCAL = "(LDL|STL)"
# One element at a time where a whole row is meant.
NARROW = r"(LDG|STG)\.E\.(U16|U8|S16|S8)"
NARROW_STORE = r"STG\.E\.(U16|U8|S16|S8)"


@dataclass(frozen=True)
class Limits:
    """Of one kernel.

    Attributes:
        threads: of a block.
        resident: blocks whose registers an SM must hold.
        present: regular expressions, each matching some instruction (SASS) from its start.
        absent: expressions that match none.
    """

    threads: int
    resident: int
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = (LOCAL, NARROW)

    @property
    def registers(self) -> int:
        """Per thread; hardware hands them out by eight."""
        return min(255, REGISTER_FILE // (self.threads * self.resident) // 8 * 8)


_MATRIX = (TENSOR_CORE, MATRIX_LOAD)
COPY = (r"LDG\.E\.128", r"STG\.E\.128")

LIMITS: dict[str, Limits] = {
    "memory_decode_kernel": Limits(128, 3, (*_MATRIX, ASYNC_COPY)),
    "merge_parts": Limits(128, 8, (r"LDG\.E\.128",)),
    # Two blocks at D = 128, three below. Tables of float16 with pieces of an odd width are read element by element.
    "memory_decode_coded_kernel": Limits(128, 2, (*_MATRIX, ASYNC_COPY), (LOCAL, NARROW_STORE)),
    "merge_states_kernel": Limits(256, 8, COPY),
    # Copies: a full SM of 2,048 threads, and elements by themselves only where rows are not made of 16 bytes.
    "gather_rows": Limits(256, 8, COPY),
    "gather_elements": Limits(256, 8, absent=(LOCAL,)),
    "scatter_words": Limits(256, 6, COPY),
    "scatter_elements": Limits(256, 6, absent=(LOCAL,)),
    # Codes come one by one where they are not made of 16 bytes; results never leave so.
    "look_up_rows": Limits(128, 8, (ASYNC_COPY,), (LOCAL, NARROW_STORE)),
    "rotate_rows": Limits(128, 4, (*_MATRIX, ASYNC_COPY, r"STG\.E\.128"), (LOCAL, NARROW_STORE)),
    "select_rows": Limits(128, 3, (*_MATRIX, ASYNC_COPY)),
    "select_long_rows": Limits(128, 2, (*_MATRIX, ASYNC_COPY)),
    "memory_attention_kernel": Limits(128, 2, (*_MATRIX, ASYNC_COPY, r"STG\.E\.128")),
    "attention_query_gradient": Limits(128, 2, (*_MATRIX, ASYNC_COPY, r"STG\.E\.128")),
    "attention_key_gradient": Limits(128, 2, (*_MATRIX, ASYNC_COPY, r"STG\.E\.128")),
    "attention_link_readers": Limits(128, 16),
    "attention_record_gradient": Limits(128, 8, (r"LDG\.E\.128",)),
}
