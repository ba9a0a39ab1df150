"""The ops whose CUDA kernels run on the SIMT host: `torch.ops.memory3_simt.<op>`, on CPU tensors; and
`memory3_simt_or_else`, which hands on what the kernels do not take, as the ops on CUDA do."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from pathlib import Path

import torch

from memory3_kernels._registry import OPS

from . import build

ORDERS = ("forward", "reverse", "random", "warp-first", "warp-last")
_libraries = [torch.library.Library(name, "DEF") for name in ("memory3_simt", "memory3_simt_or_else")]
_host: ctypes.CDLL | None = None


def load(library: Path) -> None:
    """Defines the ops and loads their kernels, once."""
    global _host
    if _host is None:
        for op in OPS.values():
            for namespace in _libraries:
                namespace.define(op.name + op.schema)
        torch.ops.load_library(str(library))
        _host = ctypes.CDLL(str(library))
        _host.simt_known_memory.restype = ctypes.c_size_t


def library() -> ctypes.CDLL:
    """The loaded host.

    Raises:
        RuntimeError: `load` was not called.
    """
    if _host is None:
        raise RuntimeError("load() the SIMT host first")
    return _host


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"memory3_simt::{name}", "CPU")


def names(csrc: Path = build.CSRC) -> list[str]:
    """Ops with a CUDA kernel."""
    return sorted(p.stem for p in (csrc / "torch" / "cuda").glob("*.cpp"))


def call(name: str, *args, **kwargs):
    """Runs an op's CUDA kernels, through their binding, on the host."""
    return getattr(torch.ops.memory3_simt, name)(*args, **kwargs)


@contextmanager
def schedule(order: str, seed: int = 0):
    _host.simt_set_order(ORDERS.index(order), ctypes.c_uint(seed))
    try:
        yield
    finally:
        _host.simt_set_order(0, ctypes.c_uint(0))
