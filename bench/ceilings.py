"""The machine's ceilings, measured in C in the same run as everything that is compared with them."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from memory3_kernels import _load

from .timing import Summary

MATMUL = 1024


@dataclass(frozen=True)
class Ceilings:
    """read_gb_s: plain reads of a buffer far larger than the caches, best of the runs (a ceiling) at some threads;
    dot_gflop_s: sums of products of bf16 pairs held in registers; copy_gb_s: torch's copy of such a buffer, bytes read
    and written together; matmul_gflop_s: torch's product of two bfloat16 matrices of MATMUL rows. All the best of runs.
    """

    threads: int
    read_gb_s: float
    read_median_gb_s: float
    dot_gflop_s: float
    cache_bytes: int
    buffer_bytes: int
    copy_gb_s: float = 0.0
    matmul_gflop_s: float = 0.0


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    found = [32 << 20]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found.append(int(text.rstrip("KM")) * factor)
    return max(found)


def measure(threads: int, runs: int = 9) -> Ceilings:
    """Needs the native library. Raises RuntimeError without it."""
    core = _load._core
    if core is None:
        raise RuntimeError(f"ceilings need the native library: {_load.native_reason()}")
    core.m3_ceiling_read.restype = ctypes.c_uint32
    core.m3_ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    core.m3_ceiling_dot.restype = ctypes.c_int64
    core.m3_ceiling_dot.argtypes = [ctypes.c_int64, ctypes.c_int64]
    cache = last_level_cache()
    size = max(4 * cache, 256 << 20)
    buffer = torch.randint(0, 255, (size,), dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = [_seconds(lambda: core.m3_ceiling_read(buffer.data_ptr(), size)) for _ in range(runs + 1)][1:]
        steps = 1 << 20
        rates = []
        for _ in range(5):
            begin = time.perf_counter()
            rates.append(2 * core.m3_ceiling_dot(steps, threads) / (time.perf_counter() - begin) / 1e9)
        target = torch.zeros_like(buffer)
        copied = 2 * size / min(_seconds(lambda: target.copy_(buffer)) for _ in range(runs)) / 1e9
        left, right = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(left)
        multiplied = 2 * MATMUL**3 / min(_seconds(lambda: torch.mm(left, right, out=product)) for _ in range(5)) / 1e9
    finally:
        torch.set_num_threads(before)
    return Ceilings(
        threads, size / min(seconds) / 1e9, size / Summary.of(seconds).median / 1e9, max(rates), cache, size,
        copied, multiplied,
    )  # fmt: skip


def _seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
