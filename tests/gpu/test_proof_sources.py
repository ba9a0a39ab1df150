"""The files that a proof is of (tests/simt/sources.py) are those that the compilers read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from simt import build, host, nvcc, sources

INCLUDE = [f"-I{build.CSRC}", f"-I{build.CSRC}/include", f"-I{build.HERE}"]


def read_by(*command: str | Path) -> set[Path]:
    """Files of the repository that a compiler names with -MM."""
    said = subprocess.run([*command, "-MM"], check=True, capture_output=True, text=True).stdout
    files = (Path(name).resolve() for name in re.sub(r"^\S+\s*:|\\\n", " ", said).split())
    return {path for path in files if path.is_relative_to(build.ROOT)}


@pytest.mark.parametrize("op", host.names())
def test_kernels_include_what_the_compiler_says(op):
    command = ["g++", "-std=c++20", "-DM3_SIMT", *INCLUDE, "-x", "c++", build.CSRC / op / f"{op}.cu"]
    assert sources.kernel(op) == read_by(*command)


def test_nvcc_reads_no_more():
    if nvcc.missing():
        pytest.skip(nvcc.missing())
    kernel = build.CSRC / "memory_decode_coded" / "memory_decode_coded.cu"
    read = read_by(nvcc.find_nvcc.find(), "-std=c++17", *INCLUDE, kernel)
    assert kernel in read and read <= sources.kernel(kernel.stem)


def test_bindings_include_what_the_compiler_says():
    torch = build.find_torch.find()
    flags = ["-std=c++20", "-DM3_SIMT", f"-DTORCH_TARGET_VERSION={build.TORCH_FLOOR}", "-DTORCH_STABLE_ONLY"]
    binding = build.CSRC / "torch" / "cuda" / "memory_decode_coded.cpp"
    parts = [[binding], [build.HERE / "simt.cpp"], ["-x", "c++", build.CSRC / "common" / "cuda" / "api.cu"]]
    found = [read_by("g++", *flags, *INCLUDE, "-isystem", f"{torch}/include", *part) for part in parts]
    assert sources.host(binding.stem) == sources.kernel(binding.stem).union(*found)


def test_sources_of_the_cpu_are_left_out():
    assert not [path for path in sources.host() if path.name.endswith((".simd.cpp", "vec.h", "team.h", "pair_tile.h"))]


def test_contracts_are_followed():
    names = {path.stem for path in sources.contract("memory_decode_coded")}
    assert {"memory_decode_coded", "memory_decode", "_codec", "_checks"} <= names
    assert not {"decode_step", "packed_linear", "int8_linear"} & {path.stem for path in sources.contract()}


def test_ops_do_not_import_each_others_triton_kernels():
    """What a record depends on is the op's own file and the shared ones, whose names begin with an underscore."""
    own = {path.stem for path in sources.TRITON.glob("[!_]*.py")}
    for path in sources.TRITON.glob("*.py"):
        imported = re.findall(r"^\s*from \.(\w*) import ([\w, ]+)", path.read_text(), re.MULTILINE)
        names = {name for module, parts in imported for name in ([module] if module else re.findall(r"\w+", parts))}
        assert not names & own, f"{path.name} imports {names & own}"
