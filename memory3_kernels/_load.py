"""Loads the native libraries and keeps the reason where it could not: importing the package never fails for them."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

import torch

LIB_DIR = Path(os.environ.get("M3_LIB_DIR") or Path(__file__).parent / "lib")  # another build, for tests
CPU_LIBRARY = LIB_DIR / "libm3_cpu.so"
TORCH_LIBRARY = LIB_DIR / "libm3_torch.so"

SIMD_LEVELS = ("none", "avx2", "avx512", "avx512bf16", "amx")

_core: ctypes.CDLL | None = None
_reason: str | None = None


def load() -> None:
    """Loads the core and its torch binding once. `M3_NATIVE=0` leaves them out: every op runs on its reference."""
    global _core, _reason
    if os.environ.get("M3_NATIVE", "1") == "0":
        _reason = "M3_NATIVE=0"
    elif not CPU_LIBRARY.is_file() or not TORCH_LIBRARY.is_file():
        _reason = f"{LIB_DIR} has no native libraries: build them with `pip install -e .` (needs g++)"
    else:
        try:
            core = ctypes.CDLL(str(CPU_LIBRARY))
            torch.ops.load_library(str(TORCH_LIBRARY))
        except OSError as error:
            _reason = f"{type(error).__name__}: {error}"
            return
        core.m3_simd.restype = core.m3_version.restype = core.m3_last_error.restype = ctypes.c_char_p
        core.m3_set_simd.argtypes = [ctypes.c_char_p]
        _core = core


def native_reason() -> str | None:
    """Why the native library is not in use, or None where it is."""
    return _reason


def native_version() -> str | None:
    return _core.m3_version().decode() if _core else None


def simd_level() -> str | None:
    """The SIMD level native kernels run at, one of SIMD_LEVELS (None without the native library)."""
    return _core.m3_simd().decode() if _core else None


def set_simd_level(level: str) -> None:
    """Forces the SIMD level of every later native call in this process (`M3_SIMD` does it from outside).

    Raises:
        RuntimeError: no native library, an unknown level, or one this CPU lacks.
    """
    if _core is None:
        raise RuntimeError(f"SIMD level: there is no native library ({_reason})")
    if _core.m3_set_simd(level.encode()):
        raise RuntimeError(_core.m3_last_error().decode())


@contextmanager
def use_simd_level(level: str):
    """`with use_simd_level("avx2"): ...`: a level for one block (process-wide while it lasts)."""
    before = simd_level()
    set_simd_level(level)
    try:
        yield
    finally:
        set_simd_level(before)


def available_simd_levels() -> list[str]:
    """Levels this CPU and build can run, lowest first."""
    found = []
    if _core is not None:
        before = simd_level()
        for level in SIMD_LEVELS:
            if not _core.m3_set_simd(level.encode()):
                found.append(level)
        set_simd_level(before)
    return found
