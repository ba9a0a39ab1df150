"""Triton kernels without a GPU: compiled for an architecture, looked into, and their PTX run by an interpreter.

Launches are compiled with the specialisation Triton's launcher would choose (types, 16-byte divisibility, ones). The
PTX interpreter is optional: the module `ptxrun`, on the import path or in the folder that `M3_PTXRUN` names.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..triton._launch import Launch
from .cuda_limits import REGISTER_FILE, SHARED_LIMIT

ARCHS = tuple(SHARED_LIMIT)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Figures:
    """What the tools say of one kernel on one architecture."""

    kernel: str
    arch: int
    registers: int
    spills: int  # bytes of local memory per thread
    stack: int
    shared: int
    threads: int
    opcodes: dict[str, int] = field(default_factory=dict)  # SASS, by the whole name

    def faults(self, stack: int = 0) -> list[str]:
        """Reasons why this kernel would not run, or not well, on its architecture; `stack`: bytes that are let pass."""
        found = []
        if self.spills or self.stack > stack:
            found.append(f"{self.spills} bytes of local memory and {self.stack} of stack per thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, at most {SHARED_LIMIT[self.arch]}")
        if self.registers * self.threads > REGISTER_FILE:
            found.append(f"{self.registers} registers x {self.threads} threads are more than {REGISTER_FILE}")
        return found

    def count(self, pattern: str) -> int:
        """Instructions whose name begins with something the expression matches."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """(signature, constants, attributes) for triton.compile, as Triton's launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
            continue
        value = launch.args[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible = _is_aligned(value)
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


_compiled: dict[tuple, Any] = {}


def compile_launch(launch: Launch, arch: int):
    """The kernel of a launch, compiled for sm_`arch` (Triton's CompiledKernel), kept for the next equal launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    key = (launch.kernel.__name__, arch, launch.num_warps, launch.num_stages, tuple(signature.items()),
           tuple(constants.items()), tuple(attributes))  # fmt: skip
    if key not in _compiled:
        source = ASTSource(launch.kernel, signature, constants, attributes)
        # Fused multiply-adds are what Triton does unless told otherwise, until 3.10.
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
        _compiled[key] = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _compiled[key]


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{_tools()}:{os.environ.get('PATH', '')}"}
    command = [str(_tools() / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def figures(launch: Launch, arch: int) -> Figures:
    """Compiles a launch and reads resources and instructions off the binary."""
    compiled = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes: dict[str, int] = {}
    for opcode in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass):
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
    return Figures(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=number["REG"],
        spills=number["LOCAL"],
        stack=number["STACK"],
        shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        opcodes=opcodes,
    )


def missing_ptxrun() -> str | None:
    """Why PTX cannot be run here, or None."""
    try:
        _ptxrun()
    except ImportError as error:
        return f"the PTX interpreter is not there: {error} (M3_PTXRUN names its folder)"
    return None


@cache
def _ptxrun():
    folder = os.environ.get("M3_PTXRUN")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("ptxrun")


@cache
def _module(ptx: str):
    return _ptxrun().Module(ptx)


def _memory(tensor: Tensor, fresh: bool, name: str):
    """The bytes from a tensor's first element to its last, as device memory: gaps of a view are part of it."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (reach + 1) * tensor.element_size() if tensor.numel() else 0
    if size:
        import ctypes

        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
    else:
        data = np.zeros(0, np.uint8)
    align = 256 if _is_aligned(tensor) else tensor.element_size()
    return _ptxrun().Buffer(data, uninit=fresh, name=name, align=align)


class PtxRunner:
    """A runner of launches (`_launch.use_runner`): compiles each for sm_`arch` and runs its PTX.

    Every access is checked against the tensors given, reads of what nobody wrote, races in shared memory and
    asynchronous copies too: ptxrun.KernelError where there is one. `results` keeps (launch, statistics).
    """

    def __init__(self, arch: int, **options):
        self.arch, self.options, self.results = arch, options, []
        self._written: set[tuple[int, int]] = set()

    def __call__(self, launch: Launch) -> None:
        compiled = compile_launch(launch, self.arch)
        signature, _, _ = specialise(launch)
        arguments, memory = [], {}
        for name, kind in signature.items():
            if kind == "constexpr":
                continue
            value = launch.args[name]
            if isinstance(value, Tensor):
                key = (value.data_ptr(), value.nbytes)
                if key not in memory:
                    fresh = name in launch.fresh and key not in self._written
                    memory[key] = _memory(value, fresh, name)
                value = memory[key]
            arguments.append(value)
        self._written |= {(launch.args[n].data_ptr(), launch.args[n].nbytes) for n in launch.fresh}
        module = _module(compiled.asm["ptx"])
        name = compiled.metadata.name
        scratch = len(module.info(name)["params"]) - len(arguments)
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            raise RuntimeError(f"{name}: scratch memory is not expected")
        result = module.launch(
            name,
            grid=launch.grid,
            block=32 * compiled.metadata.num_warps,
            args=[*arguments, *[None] * scratch],
            smem=compiled.metadata.shared,
            **self.options,
        )
        self.results.append((launch, result))
