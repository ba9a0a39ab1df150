"""One kernel launch as a value: what runs it can be exchanged, for a device, the interpreter or a check of the PTX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._registry import OPS


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes; the first may be large, the others at most 65535.
        args: tensors, ints and floats, in the order of the kernel's parameters.
        constants: its `tl.constexpr` parameters.
        fresh: names of tensors that hold nothing before the first of the op's launches writes them.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | float]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fresh: tuple[str, ...] = field(default=())


def on_device(launch: Launch) -> None:
    """Runs on the current stream of the device of the tensors (or on the interpreter)."""
    device = next(a.device for a in launch.args.values() if isinstance(a, Tensor))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch.kernel[launch.grid](**launch.args, **launch.constants, **options)
    else:
        launch.kernel[launch.grid](**launch.args, **launch.constants, **options)


_runner: Callable[[Launch], object] = on_device


def replaced() -> bool:
    """Whether something else than a device or the interpreter runs the launches."""
    return _runner is not on_device


@contextmanager
def use_runner(runner: Callable[[Launch], object]):
    """Inside the block `runner` gets the launches: to look at them, or to run them by other means."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def run(launches: Iterable[Launch]) -> None:
    """Runs launches in order; one without programs is left out."""
    for launch in launches:
        if 0 not in launch.grid:
            _runner(launch)


def outputs(op_name: str, *args, **kwargs):
    """Checks shapes and dtypes and allocates the outputs: the op's fake on real tensors."""
    return OPS[op_name].fake(*args, **kwargs)


def checks_values() -> bool:
    """M3_DEBUG=1: values of index tensors are read on the host and refused where they are out of range. Otherwise they
    are never looked at there, and kernels take a bad one as absent."""
    return os.environ.get("M3_DEBUG", "0") == "1"


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def vector(*tensors: Tensor) -> int:
    """The elements of 16 bytes where every row of the tensors begins at a multiple of 16 bytes, else 1.

    Kernels take strides in units of it and multiply them back: then the compiler knows that they may load 16 bytes at a
    time, also where a stride is no multiple of 16 elements, which is all that Triton's launcher looks for.
    """
    step = 16 // tensors[0].element_size()
    for tensor in tensors:
        aligned = tensor.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in tensor.stride()[:-1])
        if tensor.numel() and not aligned:
            return 1
    return step


def divide(args: dict, step: int, *names: str) -> None:
    """Divides strides, given by name or by the beginning of their names, by `step`."""
    for name in args:
        if isinstance(args[name], int) and name.startswith(names):
            args[name] //= step
