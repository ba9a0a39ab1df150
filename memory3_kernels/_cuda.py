"""Loads the CUDA kernels: without a GPU or a driver too; whether they run on a device is asked when there is one."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ._load import LIB_DIR

BINDING = LIB_DIR / "libm3_torch_cuda.so"

_library: ctypes.CDLL | None = None
_reason: str | None = None


def library_path() -> Path | None:
    """libm3_cuda, named after the major version of the toolkit it was built with."""
    return max(LIB_DIR.glob("libm3_cuda_cu*.so"), default=None)


def load() -> None:
    """Loads the kernels and their torch binding once, or keeps the reason why not."""
    global _library, _reason
    path = library_path()
    if os.environ.get("M3_NATIVE", "1") == "0":
        _reason = "M3_NATIVE=0"
    elif path is None or not BINDING.is_file():
        _reason = "libm3_cuda is not built: install where nvcc is found, or with M3_CUDA=1 for the reason why not"
    else:
        try:
            library = ctypes.CDLL(str(path))
            torch.ops.load_library(str(BINDING))
        except OSError as error:
            _reason = f"{type(error).__name__}: {error}"
            return
        library.m3_cuda_archs.restype = ctypes.c_char_p
        _library, _reason = library, None


def reason() -> str | None:
    """Why the CUDA kernels are not loaded, or None."""
    return _reason


def archs() -> str:
    """Compute capabilities the CUDA kernels were built for, as in "80;90+PTX"; empty where they are not loaded."""
    return _library.m3_cuda_archs().decode() if _library else ""


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a device: code of its major version up to its minor one, or PTX not newer."""
    for arch in filter(None, archs.split(";")):
        number = int(arch.removesuffix("+PTX"))
        built = divmod(number, 10)
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if arch.endswith("+PTX") and built <= capability:
            return True
    return False


@cache
def device_refused(index: int) -> str | None:
    """Why the CUDA kernels do not run on `cuda:index`, or None."""
    capability = torch.cuda.get_device_capability(index)
    if serves(archs(), capability):
        return None
    return (
        f"libm3_cuda was built for {archs()}, cuda:{index} has compute capability "
        f"{capability[0]}.{capability[1]}: reinstall with M3_CUDA_ARCHS={capability[0]}{capability[1]}"
    )


@contextmanager
def dry_run():
    """Inside the block, CUDA launchers called by this thread check their arguments and launch nothing."""
    _library.m3_cuda_dry_run(1)
    try:
        yield
    finally:
        _library.m3_cuda_dry_run(0)
