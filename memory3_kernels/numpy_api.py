"""The codec, the record format and the SIMD level for numpy users, through the native module `_numpy`.

Needs numpy and the native library, not torch: where torch is not installed `import memory3_kernels.numpy_api` still
works. There is no fallback here: without the native module every function raises ImportError with the reason.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

try:
    from . import _numpy

    _reason = None
except ImportError as _error:
    _numpy = None
    _reason = f"{type(_error).__name__}: {_error}"

__all__ = [
    "Record",
    "code_bytes",
    "pack_record",
    "parse_record",
    "set_simd_level",
    "simd_level",
    "unavailable_reason",
    "vq_dequantize",
]


class Record(NamedTuple):
    """A bank's record, its arrays read-only views of the bytes it was parsed from.

    Attributes:
        record_id: 16 bytes.
        n_valid: tokens that hold something, from the first on, the same for every head.
        n_tokens: length of the reference in tokens.
        coded: kv holds codes.
        kv: uint8, 1-dimensional. Dense: the bytes of [Lm, 2, Hm, K, D] in the bank's dtype, so
            `kv.view(np.float16).reshape(...)`; numpy has no bfloat16 (view as uint16). Coded: [Lm, 2, Hm, G].
        pos: uint16 [Lm * Hm * K], position of each kept token within its reference; 65535: none.
        bias: float32 [Lm * Hm * K], or None.
    """

    record_id: bytes
    n_valid: int
    n_tokens: int
    coded: bool
    kv: np.ndarray
    pos: np.ndarray
    bias: np.ndarray | None


def unavailable_reason() -> str | None:
    """Why the native module is not loaded, or None where it is."""
    return _reason


def _native():
    if _numpy is None:
        raise ImportError(f"memory3_kernels._numpy is not built ({_reason}): run `pip install -e .` (needs g++)")
    return _numpy


def code_bytes(coarse: np.ndarray, fine: np.ndarray) -> int:
    """Bytes of one vector's code: ceil(2b / 8) + ceil(M n / 8).

    Args:
        coarse: [2, 2^b, D/2] float32 or float16.
        fine: [M, 2^n, D/M], the same dtype.

    Raises:
        ValueError: shapes or dtypes do not make a book.
        ImportError: the native module is not built.
    """
    return _native().code_bytes(coarse, fine)


def vq_dequantize(
    codes: np.ndarray, coarse: np.ndarray, fine: np.ndarray, rot: np.ndarray | None = None, dtype: str = "float32"
) -> np.ndarray:
    """Vectors from their codes (Memory3, arXiv 2407.01178, section 3.3; docs/ops/vq_dequantize.md).

    Args:
        codes: uint8 [..., code_bytes].
        coarse: [2, 2^b, D/2] float32 or float16, b from 4 to 14.
        fine: [M, 2^n, D/M], the same dtype, n from 4 to 14.
        rot: [D, D] float32, or None: the vectors stay in the rotated basis.
        dtype: "float32" or "float16", of the result.

    Returns:
        [..., D]: rot^T (coarse part + fine part), what FAISS' `sa_decode` gives for the same bytes.

    Raises:
        ValueError: shapes or dtypes do not match; the message names the argument, what was expected and what came.
        ImportError: the native module is not built.
    """
    return _native().vq_dequantize(codes, coarse, fine, rot, dtype)


def parse_record(value: bytes | memoryview | np.ndarray, *, check_body: bool = True) -> Record:
    """Reads a record as a bank stores it; nothing is copied.

    Args:
        value: head and body; must outlive the result unless it is an object numpy can hold on to (bytes are).
        check_body: False skips the checksum of the body (the head's is always checked).

    Raises:
        ValueError: the bytes are not a whole record: magic, version, sizes or a checksum are wrong.
        ImportError: the native module is not built.
    """
    return Record(**_native().parse_record(np.frombuffer(value, np.uint8), check_body))


def pack_record(
    record_id: bytes,
    kv: np.ndarray,
    pos: np.ndarray,
    *,
    n_valid: int,
    n_tokens: int,
    bias: np.ndarray | None = None,
    coded: bool = False,
) -> bytes:
    """The bytes of a record, as a bank stores it.

    Args:
        record_id: 16 bytes.
        kv: [Lm, 2, Hm, K, D] in the bank's dtype, or codes uint8 [Lm, 2, Hm, G] with `coded`.
        pos: uint16 [Lm, Hm, K].
        n_valid, n_tokens: 0..65535.
        bias: float32, shaped like pos, or None.

    Raises:
        ValueError: an argument does not fit.
        ImportError: the native module is not built.
    """
    return _native().pack_record(record_id, kv, pos, n_valid, n_tokens, bias, coded)


def simd_level() -> str:
    """The SIMD level native kernels run at: "none", "avx2", "avx512", "avx512bf16" or "amx".

    One setting per process, shared with torch.
    """
    return _native().simd_level()


def set_simd_level(level: str) -> None:
    """Forces the SIMD level of this process.

    Raises:
        ValueError: an unknown level, or one this CPU or build lacks.
        ImportError: the native module is not built.
    """
    _native().set_simd_level(level)
