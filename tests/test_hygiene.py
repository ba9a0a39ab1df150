"""Rules of the house that a reviewer would otherwise have to remember (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGES = ("memory3", "memory3_kernels")
PYTHON = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".c", ".map", ".cu", ".cuh"))
HEADERS = sorted((CSRC / "include").rglob("*.h"))
LIMIT = 600
BINDINGS = ("torch", "python", "numpy")  # folders of csrc that are not the core


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folder_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def imports(path: Path) -> list[str]:
    """Absolute names of the modules a file imports, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return found


def test_there_is_something_to_look_at():
    assert len(PYTHON) > 10 and len(NATIVE) > 10 and len(HEADERS) > 3


@pytest.mark.parametrize("path", [p for p in NATIVE if p.suffix != ".map"], ids=name_of)
def test_torch_and_pybind_stay_in_their_folders(path):
    folder = folder_of(path)
    for header in includes(path):
        if header.startswith(("torch/csrc", "torch/headeronly", "torch/extension", "ATen/", "c10/")):
            assert folder == "torch", f"{header}: only csrc/torch may know torch"
        if header.startswith("pybind11/") or header == "Python.h":
            assert folder in ("python", "numpy"), f"{header}: only csrc/python and csrc/numpy may know Python"


@pytest.mark.parametrize("path", HEADERS, ids=name_of)
def test_public_headers_are_c(path, tmp_path):
    """Each on its own: C11, warnings are errors, nothing but the C library and other public headers."""
    source = tmp_path / "one.c"
    source.write_text(f'#include "m3/{path.name}"\nint used;\n')
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", "-pedantic", "-fsyntax-only",
               "-x", "c", f"-I{CSRC / 'include'}", source]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(header in ("stdint.h", "stddef.h") or header.startswith("m3/") for header in includes(path))


@pytest.mark.parametrize("path", [p for p in NATIVE if p.name.endswith(".simd.cpp")], ids=name_of)
def test_wide_files_use_no_templates_of_the_standard_library(path):
    """A wide instantiation of an inline std function could replace the baseline's at link time (see common/vec.h)."""
    seen, queue = set(), [path]
    while queue:
        for header in includes(queue.pop()):
            target = next((d / header for d in (CSRC, CSRC / "include") if (d / header).is_file()), None)
            if target is None:
                assert header.endswith(".h"), f"<{header}> reached from {name_of(path)}: C headers and intrinsics only"
            elif target not in seen:
                seen.add(target)
                queue.append(target)


@pytest.mark.parametrize("path", [p for p in NATIVE if folder_of(p) not in BINDINGS], ids=name_of)
def test_the_core_never_prints_exits_or_throws(path):
    text = re.sub(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL)
    found = re.search(
        r"\b(f?printf|f?puts|exit|abort|malloc|calloc|vector<\w+>)\s*\(|\bthrow\b|(?<!<)\bnew\b(?! \(std::nothrow\))",
        text,
    )
    assert not found, found


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=name_of)
def test_files_are_short(path):
    lines = sum(bool(line.strip()) for line in path.read_text().splitlines())
    assert lines <= LIMIT, f"{lines} lines that are not blank, at most {LIMIT}: split the file"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_packages_raise_instead_of_assert(path):
    found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not found, f"assert in lines {found}: python -O removes it; raise an error that says what to do"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.is_relative_to(ROOT / "memory3_kernels")], ids=name_of)
def test_kernels_do_not_know_the_model(path):
    bad = [m for m in imports(path) if m == "memory3" or m.startswith("memory3.")]
    assert not bad, f"memory3_kernels must not import {bad}"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.is_relative_to(ROOT / "memory3")], ids=name_of)
def test_the_model_knows_only_public_kernels(path):
    """memory3 calls the public functions: no private module, no torch.ops.memory3, no source folder of the kernels."""
    private = [m for m in imports(path) if m.startswith("memory3_kernels.") and ("._" in m or m.split(".")[1] == "ops")]
    assert not private, f"memory3 must not import {private}"
    assert "csrc" not in path.read_text() and "torch.ops.memory3" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in PYTHON if p.is_relative_to(ROOT / "memory3_kernels")], ids=name_of)
def test_kernels_depend_on_torch_and_numpy_alone(path):
    import sys

    roots = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names)
    with_triton = {"triton"} if path.parent.name == "triton" or path.name.startswith("triton_") else set()
    assert roots <= {"torch", "numpy", "memory3_kernels"} | with_triton, roots


def test_each_op_has_its_files():
    """One contract, one folder of kernels, one binding and one launcher per op, all by the same name."""
    ops = {p.stem for p in (ROOT / "memory3_kernels" / "ops").glob("[!_]*.py")}
    launchers = set(re.findall(r"\bm3_(\w+)_cpu\(", "".join(p.read_text() for p in HEADERS)))
    bindings = {p.stem for p in (CSRC / "torch").glob("*.cpp")} - {"module"}
    folders = {p.name for p in CSRC.iterdir() if p.is_dir()} - {"common", "include", *BINDINGS}
    assert ops == bindings == folders == launchers


def test_each_cuda_kernel_has_its_files():
    """One file of kernels, one binding and one launcher, all by the name of the op."""
    kernels = {p.parent.name for p in CSRC.glob("*/*.cu")} - {"common"}
    bindings = {p.stem for p in (CSRC / "torch" / "cuda").glob("*.cpp")}
    launchers = set(re.findall(r"\bm3_(\w+)_cuda\(", "".join(p.read_text() for p in HEADERS)))
    ops = {p.stem for p in (ROOT / "memory3_kernels" / "ops").glob("[!_]*.py")}
    assert kernels == bindings == launchers and kernels <= ops


@pytest.mark.parametrize("path", [p for p in NATIVE if p.suffix in (".cu", ".cuh")], ids=name_of)
def test_kernels_are_launched_and_written_in_one_place(path):
    """Launches in common/cuda/launch.cuh, PTX and CUDA's own names in device.cuh: the SIMT host replaces those two.
    What only makes two kernels overlap is in overlap.cuh, whose form for the host does nothing."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    if path.name not in ("launch.cuh", "overlap.cuh"):
        assert "<<<" not in text and "cudaLaunch" not in text
    if path.name not in ("device.cuh", "overlap.cuh"):
        assert not re.search(r"\basm\b|\bthreadIdx\b|\bblockIdx\b|__syncthreads|__shfl|__shared__|__global__", text)
    assert not re.search(r"cudaMalloc|cudaFree|Synchronize\b|cudaGetDeviceProperties", text)
