"""Triton kernels, one file per op, imported at the op's first call: importing the package needs no Triton.

A file `<op>.py` here gives the op a kernel, by name alone. It has one function, `call`, with the op's signature, which
allocates the outputs and runs a list of `Launch`es (docs/triton.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent


def has_kernel(op_name: str) -> bool:
    return (FOLDER / f"{op_name}.py").is_file()


@cache
def missing() -> str | None:
    """Why no Triton kernel can run, whatever the device, or None."""
    return None if find_spec("triton") is not None else "triton is not installed: pip install 'triton>=3.7.1'"


def interpreted() -> bool:
    """Whether kernels run on Triton's interpreter. Decided when a kernel's file is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def runs_without_device() -> bool:
    """Whether launches on CPU tensors work here: on the interpreter, or handed to a test's own runner."""
    from ._launch import replaced

    return interpreted() or replaced()


@cache
def implementation(op_name: str) -> Callable:
    """The op as a function that launches Triton kernels."""
    return import_module(f"{__name__}.{op_name}").call
