"""The CUDA kernels as nvcc compiles them: PTX, binaries, and what the tools say of those."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from . import build, sources

sys.path.insert(0, str(build.ROOT / "_build"))
import find_nvcc  # noqa: E402

ARCHS = (80, 86, 89, 90, 100, 120)
OUT = build.ROOT / "build" / "nvcc"


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if find_nvcc.find() else "nvcc is not installed (CUDA_HOME, PATH or pip's nvidia packages)"


def version() -> str | None:
    if missing():
        return None
    said = subprocess.run([find_nvcc.find(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


@cache
def _tools() -> dict[str, str]:
    """cuobjdump and nvdisasm: beside nvcc, on PATH, or in Triton's wheel."""
    folders = [str(find_nvcc.find().parent), os.environ.get("PATH", "")]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    path = os.pathsep.join(folders)
    return {name: shutil.which(name, path=path) or "" for name in ("cuobjdump", "nvdisasm")}


def missing_tools() -> str | None:
    if missing():
        return missing()
    return None if all(_tools().values()) else "cuobjdump and nvdisasm are not installed (Triton's wheel has them)"


def compile_kernels(op: str, arch: int, kind: str, one_shape: bool = False) -> Path:
    """`op`'s kernels as "ptx" or "cubin" for sm_`arch`; kept until a source changes.

    Args:
        one_shape: bfloat16 and a head dimension of 80 only, a sixth of the work.

    Raises:
        RuntimeError: nvcc's output.
    """
    source = build.CSRC / op / f"{op}.cu"
    target = OUT / f"{op}.sm_{arch}{'.one' if one_shape else ''}.{kind}"
    newest = max(p.stat().st_mtime for p in sources.kernel(op, build.CSRC))
    if target.is_file() and target.stat().st_mtime > newest:
        return target
    OUT.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".part{os.getpid()}")
    flags = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-arch=sm_{arch}",
        f"-{kind}",
        *(["-DM3_ONE_SHAPE"] if one_shape else []),
    ]
    command = [
        str(find_nvcc.find()),
        *flags,
        f"-I{build.CSRC}",
        f"-I{build.CSRC}/include",
        str(source),
        "-o",
        str(part),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc cannot compile {source.name} for sm_{arch}:\n{done.stderr}")
    part.replace(target)
    return target


@dataclass
class Resources:
    """Of one kernel on one architecture."""

    kernel: str  # mangled
    arch: int
    registers: int
    stack: int
    spills: int  # bytes of local memory per thread
    opcodes: dict[str, int] = field(default_factory=dict)  # SASS instructions by full name

    @property
    def name(self) -> str:
        """Without namespaces and template arguments."""
        parts, rest = [], self.kernel.removeprefix("_ZN").removeprefix("_Z")
        while match := re.match(r"(\d+)", rest):
            size = int(match[1])
            rest = rest[len(match[1]) :]
            parts.append(rest[:size])
            rest = rest[size:]
        return parts[-1]

    def count(self, pattern: str) -> int:
        """Instructions whose name matches from its start."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


def _run(name: str, *arguments: str) -> str:
    tools = _tools()
    path = os.pathsep.join([str(Path(tools["nvdisasm"]).parent), os.environ.get("PATH", "")])
    command = [tools[name], *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


def resources(op: str, arch: int, one_shape: bool = False) -> list[Resources]:
    """What cuobjdump finds in the binary of `op`."""
    cubin = str(compile_kernels(op, arch, "cubin", one_shape))
    found = {}
    usage = _run("cuobjdump", "-res-usage", cubin)
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(REG:[^\n]*)", usage):
        number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}
        found[name] = Resources(name, arch, number["REG"], number["STACK"], number["LOCAL"])
    sass = _run("cuobjdump", "-sass", cubin)
    for name, body in re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL):
        counts = found[name].opcodes
        for opcode in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body):
            counts[opcode] = counts.get(opcode, 0) + 1
    return list(found.values())
