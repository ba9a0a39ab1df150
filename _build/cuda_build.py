"""The CUDA part of the build: whether, for which architectures, with which flags.

M3_CUDA        auto (default): where nvcc is found; 1: required; 0: left out
M3_CUDA_ARCHS  "80;90;120+PTX": code for these compute capabilities, PTX too where it says so (newer devices compile
               that when they load it); "release": RELEASE. Default: that of this machine's GPUs, else DEFAULT.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import find_nvcc

RELEASE = "80;86;89;90;100;120+PTX"
DEFAULT = "80+PTX"
OLDEST = 80  # cp.async and bf16 mma


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    major: int  # of CUDA; the library's name carries it
    archs: str  # as M3_CUDA_ARCHS

    @property
    def library(self) -> str:
        return f"libm3_cuda_cu{self.major}.so"

    @property
    def targets(self) -> list[str]:
        """-gencode flags."""
        flags = []
        for arch in self.archs.split(";"):
            number = arch.removesuffix("+PTX")
            flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
        return flags

    @property
    def link_flags(self) -> list[str]:
        """pip's toolkit keeps libcudart_static.a where nvcc does not look."""
        folder = self.nvcc.resolve().parent.parent / "lib"
        return ["-cudart static", *([f"-L{folder}"] if (folder / "libcudart_static.a").is_file() else [])]


def parse(text: str, known: set[str]) -> str:
    """ "8.0, 9.0+PTX" -> "80;90+PTX", in ascending order.

    Raises:
        RuntimeError: not such a list, or an architecture that nvcc (`known`: "sm_80", ...) or the kernels cannot take.
    """
    found = {}
    for part in filter(None, re.split(r"[;,\s]+", RELEASE if text.strip() == "release" else text)):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", part)
        if match is None:
            raise RuntimeError(f'M3_CUDA_ARCHS: expected a list like "80;90;120+PTX" or "release", got {text!r}')
        number = int(match[1] + match[2])
        if number < OLDEST:
            raise RuntimeError(f"M3_CUDA_ARCHS: the kernels need compute capability 8.0, got {part!r}")
        if f"sm_{number}" not in known:
            raise RuntimeError(f"M3_CUDA_ARCHS: this nvcc has no sm_{number}, only {', '.join(sorted(known))}")
        found[number] = found.get(number, "") or match[3] or ""
    if not found:
        raise RuntimeError(f"M3_CUDA_ARCHS: expected at least one architecture, got {text!r}")
    return ";".join(f"{number}{found[number]}" for number in sorted(found))


def _local() -> str:
    """Architectures of this machine's GPUs; DEFAULT where there is none, or none that the kernels run on."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        numbers = {int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)}
        if done.returncode == 0 and numbers and min(numbers) >= OLDEST:
            return ";".join(map(str, sorted(numbers)))
    return DEFAULT


@cache
def toolkit() -> Toolkit | None:
    """What to build with, or None where CUDA is left out.

    Raises:
        RuntimeError: M3_CUDA=1 without nvcc, or a value that is none.
    """
    wanted = os.environ.get("M3_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise RuntimeError(f"M3_CUDA: expected 0, 1 or auto, got {wanted!r}")
    nvcc = find_nvcc.find() if wanted != "0" else None
    if nvcc is None:
        if wanted == "1":
            raise RuntimeError(
                "M3_CUDA=1, but no nvcc was found: set CUDA_HOME to a CUDA toolkit (12 or newer), put nvcc on PATH, or "
                "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-cccl"
            )
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    major = int(re.search(r"release (\d+)\.", said)[1])
    known = set(subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split())
    return Toolkit(nvcc, major, parse(os.environ.get("M3_CUDA_ARCHS") or _local(), known))
