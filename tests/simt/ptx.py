"""Launches of the CUDA kernels, run by the PTX interpreter `ptxrun` from what nvcc compiled (optional: on the import
path, or in the folder M3_PTXRUN names). Every access is checked against the memory the launch was given."""

from __future__ import annotations

import ctypes
import struct
from contextlib import contextmanager
from functools import cache

import numpy as np

from memory3_kernels.testing.triton_ptx import _ptxrun as interpreter
from memory3_kernels.testing.triton_ptx import missing_ptxrun

from . import host, nvcc


class _Launch(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("grid", ctypes.c_uint), ("block", ctypes.c_uint),
                ("shared", ctypes.c_size_t), ("count", ctypes.c_int),
                ("arguments", ctypes.POINTER(ctypes.c_void_p)), ("sizes", ctypes.POINTER(ctypes.c_size_t))]  # fmt: skip


class _Memory(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("fresh", ctypes.c_int)]


_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch), ctypes.c_char_p)


def missing() -> str | None:
    return nvcc.missing() or missing_ptxrun()


class Run:
    """The launches of one op call. `results`: (kernel, statistics) each; `error`: what stopped them."""

    def __init__(self, op: str, arch: int, one_shape: bool, options: dict):
        self.op, self.options = op, options
        self.module = _module(op, arch, one_shape)
        self.results: list[tuple[str, dict]] = []
        self.error: Exception | None = None
        self._buffers: list[tuple[int, int, object]] = []  # first address, size, memory

    def _known(self) -> list[tuple[int, int, bool]]:
        """Ranges of memory, views of one buffer joined."""
        entries = ctypes.POINTER(_Memory)()
        count = host.library().simt_known_memory(ctypes.byref(entries))
        ranges = []
        for first, size, fresh in sorted((e.data, e.bytes, bool(e.fresh)) for e in entries[:count]):
            if ranges and first < ranges[-1][0] + ranges[-1][1]:
                before = ranges.pop()
                end = max(first + size, before[0] + before[1])
                ranges.append((before[0], end - before[0], before[2] and fresh))
            else:
                ranges.append((first, size, fresh))
        return ranges

    def _device(self, address: int) -> int | None:
        """The interpreter's address for one of ours."""
        for first, size, buffer in self._buffers:
            if first <= address < first + size:
                return buffer.at(address - first)
        return None

    def _see_memory(self) -> None:
        have = {first for first, _, _ in self._buffers}
        for first, size, fresh in self._known():
            if first not in have:
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(first))
                align = 256 if first % 256 == 0 else 16
                memory = interpreter().Buffer(data, uninit=fresh, name=f"{first:x}", align=align)
                self._buffers.append((first, size, memory))

    def __call__(self, launch, symbol: bytes) -> int:
        try:
            self._see_memory()
            launch = launch.contents
            arguments = []
            for i in range(launch.count):
                raw = bytearray(ctypes.string_at(launch.arguments[i], launch.sizes[i]))
                for at in range(0, len(raw) - 7, 8):
                    device = self._device(struct.unpack_from("<Q", raw, at)[0])
                    if device is not None:
                        struct.pack_into("<Q", raw, at, device)
                arguments.append(bytes(raw))
            result = self.module.launch(symbol.decode(), grid=launch.grid, block=launch.block, args=arguments,
                                   smem=launch.shared, **self.options)  # fmt: skip
            result["shared_bytes"] = launch.shared
            self.results.append((symbol.decode(), result))
            return 0
        except Exception as error:
            self.error = error
            return 1


@cache
def _module(op: str, arch: int, one_shape: bool):
    return interpreter().Module(nvcc.compile_kernels(op, arch, "ptx", one_shape).read_text())


@contextmanager
def running(op: str, arch: int = 80, one_shape: bool = False, **options):
    """Inside the block, launches of host.call(op, ...) run as PTX for sm_`arch`.

    Raises:
        The interpreter's error, with its findings.
    """
    run = Run(op, arch, one_shape, options)
    hook = _HOOK(run)
    host.library().simt_forget_memory()
    host.library().simt_set_hook(hook)
    try:
        yield run
    except RuntimeError:
        if run.error is not None:
            raise run.error from None
        raise
    finally:
        host.library().simt_set_hook(_HOOK())
        host.library().simt_forget_memory()
