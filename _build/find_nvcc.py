"""Finds nvcc: CUDA_HOME or CUDA_PATH, PATH, pip's nvidia packages. No GPU and no driver are needed to compile."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def find() -> Path | None:
    """An nvcc, or None. `M3_CUDA` is not looked at here (native.py does)."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in homes:
        if (folder / "nvcc").is_file():
            return folder / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    for place in dict.fromkeys([*sys.path, *(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))]):
        # nvidia-cuda-nvcc, -crt, -runtime and nvidia-nvvm together make one toolkit folder per CUDA major.
        for found in sorted(Path(place).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            if (found.parent.parent / "include" / "cuda_runtime.h").is_file():
                return found
    return None
