"""Which implementation serves an op: a table, visible (`explain`) and overridable (`use_backend`, `M3_BACKEND`).

Automatic choice is the dispatcher's: on a CPU the native kernel where the library is loaded; on CUDA the CUDA kernel
where it takes the call, else the op's Triton kernel; else the PyTorch reference that every op registers under
CompositeExplicitAutograd. Only float64, which no kernel takes, is sent to the reference by the public functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensor

from . import _cuda, _load, triton


@dataclass(frozen=True)
class Backend:
    """One way to run ops. `refuses(op, args)` gives the reason it cannot serve a call, or None."""

    name: str
    refuses: Callable[[object, tuple], str | None]


def _native_refuses(op, args) -> str | None:
    if _load.native_reason():
        return f"the native library is not loaded: {_load.native_reason()}"
    for value in args:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                return f"native kernels are built for cpu only, an argument is on {value.device}"
            if value.dtype is torch.float64:
                return "native kernels take float32, bfloat16 and float16, an argument is float64"
    return None


def has_cuda_kernel(op_name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"memory3_cuda::{op_name}", "CUDA")


def _cuda_refuses(op, args) -> str | None:
    """All but what only the kernel's launcher knows (`_declined`)."""
    if _cuda.reason():
        return f"the CUDA kernels are not loaded: {_cuda.reason()}"
    if not has_cuda_kernel(op.name):
        return f"{op.name} has no CUDA kernel"
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    for value in tensors:
        if value.device.type != "cuda":
            return f"CUDA kernels run on cuda, an argument is on {value.device}"
        if value.dtype is torch.float64:
            return "CUDA kernels take bfloat16 and float16, an argument is float64"
    if not tensors and not torch.cuda.is_available():
        return "CUDA kernels run on cuda, of which there is no device"
    real = [value for value in tensors if not isinstance(value, FakeTensor)]
    return _cuda.device_refused(real[0].device.index) if real else None


def _declined(op, args, kwargs) -> str | None:
    """What the CUDA kernel's launcher has against this call: its own checks, with nothing launched."""
    needed = [a.name for a in op.overload._schema.arguments if a.kwarg_only and not a.has_default_value()]
    if not args or any(name not in kwargs for name in needed):
        return None
    try:
        with _cuda.dry_run():
            getattr(torch.ops.memory3_cuda, op.name)(*args, **kwargs)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _triton_refuses(op, args) -> str | None:
    if not triton.has_kernel(op.name):
        return f"{op.name} has no Triton kernel"
    if triton.missing():
        return triton.missing()
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if any(value.dtype is torch.float64 for value in tensors):
        return "Triton kernels take float32, bfloat16 and float16, an argument is float64"
    if forced(op.name) == "triton" and triton.runs_without_device():
        return None
    for value in tensors:
        if value.device.type != "cuda":
            return f"Triton kernels run on cuda (elsewhere in tests only), an argument is on {value.device}"
    return None if tensors or torch.cuda.is_available() else "Triton kernels run on cuda, of which there is no device"


BACKENDS = {
    "native": Backend("native", _native_refuses),
    "cuda": Backend("cuda", _cuda_refuses),
    "triton": Backend("triton", _triton_refuses),
    "reference": Backend("reference", lambda op, args: None),
}

_forced: dict[str, str] = {}


def _parse(spec: str) -> dict[str, str]:
    """ "reference" or "memory_decode:reference,select_tokens:native" -> {op or "*": backend}."""
    forced = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        op, _, backend = part.rpartition(":")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r} in {spec!r}")
        forced[op or "*"] = backend
    return forced


try:
    _forced.update(_parse(os.environ.get("M3_BACKEND", "")))
except ValueError as error:  # importing never fails: the first call says it
    _forced["*"] = f"M3_BACKEND: {error}"


@contextmanager
def use_backend(spec: str):
    """Forces a backend inside a block: `use_backend("reference")`, or per op: `use_backend("memory_decode:native")`.

    A forced backend that cannot serve a call raises RuntimeError with its reason instead of falling through.
    `M3_BACKEND` sets the same from outside.

    Raises:
        ValueError: an unknown backend.
    """
    before = dict(_forced)
    _forced.update(_parse(spec))
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced(op_name: str) -> str | None:
    return _forced.get(op_name, _forced.get("*")) if _forced else None


def choose(op, args: tuple) -> str:
    """The backend for a call.

    Raises:
        RuntimeError: a forced backend cannot serve it.
    """
    wanted = forced(op.name)
    if wanted is not None:
        if wanted not in BACKENDS:
            raise RuntimeError(wanted)
        reason = BACKENDS[wanted].refuses(op, args)
        if reason:
            raise RuntimeError(f"{op.name}: the forced backend {wanted!r} cannot serve this call: {reason}")
        return wanted
    return next(name for name, backend in BACKENDS.items() if backend.refuses(op, args) is None)


def explain(name: str, *args, **kwargs) -> str:
    """Says which backend would serve `memory3::<name>` for these arguments, and why the others would not.

    For tensors on CUDA, with the op's keyword arguments, the CUDA kernel's own checks are asked too; without them
    "available" leaves open whether it takes this shape.
    """
    from ._registry import OPS

    op = OPS[name.removeprefix("memory3::")]
    wanted = forced(op.name)
    reasons = {backend.name: backend.refuses(op, args) for backend in BACKENDS.values()}
    if reasons["cuda"] is None and not any(isinstance(a, FakeTensor) for a in args):
        reasons["cuda"] = _declined(op, args, kwargs)
    chosen = choose(op, args) if wanted else next(name for name, reason in reasons.items() if reason is None)
    lines = [f"memory3::{op.name}" + (f" (forced: {wanted})" if wanted else "")]
    for backend, reason in reasons.items():
        lines.append(f"  {backend:10s} {'chosen' if backend == chosen else reason or 'available'}")
    return "\n".join(lines)
