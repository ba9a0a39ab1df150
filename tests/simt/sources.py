"""Which files of the repository a kernel for GPUs, or an op's contract, is made from: what it names, followed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OPS = ROOT / "memory3_kernels" / "ops"
TRITON = ROOT / "memory3_kernels" / "triton"
HERE = Path(__file__).parent


def _includes(path: Path, csrc: Path) -> Iterable[Path]:
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        yield next(folder / name for folder in (csrc, csrc / "include", HERE) if (folder / name).is_file())


def _imports(path: Path) -> Iterable[Path]:
    """Modules of ops/ that one of them imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (OPS / f"{name}.py" for name in names)


def _followed(start: Iterable[Path], named: Callable[[Path], Iterable[Path]]) -> set[Path]:
    found, queue = set(), list(start)
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += named(path)
    return found


def kernel(op: str = "*", csrc: Path = CSRC) -> set[Path]:
    """What an op's kernels are compiled from, by nvcc and for the SIMT host."""
    return _followed(csrc.glob(f"{op}/*.cu"), lambda path: _includes(path, csrc))


def host(op: str = "*") -> set[Path]:
    """The same with the bindings and the host itself, which the kernels are called through on a CPU."""
    start = [*CSRC.glob(f"torch/cuda/{op}.cpp"), CSRC / "common/cuda/api.cu", HERE / "simt.cpp"]
    return kernel(op) | _followed(start, lambda path: _includes(path, CSRC))


def contract(op: str = "*") -> set[Path]:
    """The contract of an op, or of all that have CUDA kernels, and the modules of ops/ that it uses."""
    names = [path.stem for path in CSRC.glob("torch/cuda/*.cpp")] if op == "*" else [op]
    return _followed((OPS / f"{name}.py" for name in names if (OPS / f"{name}.py").is_file()), _imports)


def triton(op: str = "*") -> set[Path]:
    """The Triton kernels of an op: its file and what all share."""
    return {*TRITON.glob("_*.py"), *TRITON.glob(f"{op}.py")}
