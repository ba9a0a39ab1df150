"""Loads the native libraries and keeps the reason where it could not: importing the package never fails for them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

LIB_DIR = Path(os.environ.get("M3_LIB_DIR") or Path(__file__).parent / "lib")  # another build, for tests
CPU_LIBRARY = LIB_DIR / "libm3_cpu.so"
TORCH_LIBRARY = LIB_DIR / "libm3_torch.so"

SIMD_LEVELS = ("none", "avx2", "avx512", "avx512bf16", "amx")

# Types that an op is told by name.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_core: ctypes.CDLL | None = None
_reason: str | None = None
_direct_reason: str | None = "there is no native library"


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
        _connect_direct()


def _connect_direct() -> None:
    """Gives the module `_direct` what it calls: torch's DLPack table and the kernels of the library that is loaded."""
    global _direct_reason
    try:
        from . import _direct

        find = ctypes.CDLL(str(TORCH_LIBRARY)).m3_direct_op
        _direct.configure(
            torch.Tensor.__dlpack_c_exchange_api__,
            (torch.Tensor, torch.nn.Parameter),
            # Whoever sees calls where the dispatcher has them: modes, transforms, profilers, torch.jit.trace.
            (torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level,
             torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled, torch._C._get_tracing_state),
            (torch.is_grad_enabled, torch._C._any_requires_grad, torch._C._increment_version,
             torch.Tensor.is_inference),
            tuple(torch.empty(0, dtype=dtype) for dtype in DTYPES),
            ctypes.cast(find, ctypes.c_void_p).value,
        )  # fmt: skip
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        _direct_reason = f"{type(error).__name__}: {error}"
    else:
        _direct_reason = None


def direct_reason() -> str | None:
    """Why calls go through torch's dispatcher even where they need nothing of it, or None where they do not."""
    return _direct_reason


def direct(name: str, names: tuple[str, ...], writes: tuple[int, ...]) -> Callable:
    """The CPU kernel of an op, called past the dispatcher; NotImplemented where a call is not as plain as that takes.

    names: of all arguments; writes: positions of those that the op writes to.
    """
    if _direct_reason is None:
        from . import _direct

        found = _direct.op(name, names, writes)
        if found is not None:
            return found
    return lambda *args, **kwargs: NotImplemented


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
