"""Triton's interpreter made fit for proofs: bfloat16 and tf32 computed as hardware does, memory accesses checked.

Stock (3.7 to 3.9), the interpreter keeps a bfloat16 as its 16 bits and adds, compares and multiplies the bit patterns,
truncates float32 to bfloat16, and takes tf32 products in full. Upstream documents bfloat16 as unsupported. `install`
decodes operands to float32, computes, and rounds to nearest even; rounds tf32 operands; and checks of every access
that it lies inside one of the tensors the kernel was given, is aligned, and touches nothing that another program of the
launch wrote. It replaces private functions of Triton: tests/gpu/test_triton_interpreter.py pins what they must do.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_COMPARISONS = {np.less_equal, np.less, np.greater_equal, np.greater, np.equal, np.not_equal}
_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_Executor = interpreter.GridExecutor


class AccessError(RuntimeError):
    """A kernel touched memory it was not given, or that another program writes."""


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def to_float(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def to_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    u = values.view(np.uint32)
    rounded = ((u + (((u >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, to nearest, ties away from zero (cvt.rna.tf32)."""
    u = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded.reshape(np.shape(values)), values)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    return _Handle(to_float(handle.data), tl.float32) if _is_bf16(handle) else handle


def _fix_arithmetic() -> None:
    stock = {
        name: getattr(_Builder, name)
        for name in ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_dot", "create_fma", "create_fp_to_fp")
    }

    def binary_op(self, left, right, op):
        narrow = _is_bf16(left) and _is_bf16(right)
        if op in _COMPARISONS:  # stock labels the answer with the operands' type, which a splat then converts it to
            left, right = (_wide(x) for x in (left, right)) if narrow else (left, right)
            return _Handle(op(left.data, right.data), tl.int1)
        if not narrow:
            return stock["binary_op"](self, left, right, op)
        return _Handle(to_bits(op(to_float(left.data), to_float(right.data))), tl.bfloat16)

    def unary_op(self, value, op):
        if not _is_bf16(value):
            return stock["unary_op"](self, value, op)
        return _Handle(to_bits(op(to_float(value.data))), tl.bfloat16)

    def ternary_op(self, a, b, c, op):
        if op is np.where or not _is_bf16(c):  # a choice moves bits and computes nothing
            return stock["ternary_op"](self, a, b, c, op)
        return _Handle(to_bits(op(to_float(a.data), to_float(b.data), to_float(c.data))), tl.bfloat16)

    def cast_impl(self, value, dtype):
        source, target = value.dtype.scalar, dtype.scalar
        if source == target:
            return value
        if target == tl.bfloat16:
            return _Handle(to_bits(_wide(value).data.astype(np.float32)), tl.bfloat16)
        value = _wide(value)
        return value if target == tl.float32 and source == tl.bfloat16 else stock["cast_impl"](self, value, dtype)

    def create_fp_to_fp(self, value, dtype, rounding):
        if value.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return cast_impl(self, value, dtype)
        return stock["create_fp_to_fp"](self, value, dtype, rounding)

    def create_dot(self, a, b, accumulator, precision, *rest):
        if a.dtype.scalar == tl.float32 and str(precision).upper().endswith("TF32"):
            a, b = (_Handle(to_tf32(x.data), tl.float32) for x in (a, b))
        a, b = _wide(a), _wide(b)
        if not a.dtype.scalar.is_floating():
            return stock["create_dot"](self, a, b, accumulator, precision, *rest)
        # A float32 product of BLAS rounds equal columns differently by where they lie; a tensor core does not.
        exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return _Handle(exact.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return stock["create_fma"](self, x, y, z)
        exact = to_float(x.data).astype(np.float64) * to_float(y.data) + to_float(z.data)
        return _Handle(to_bits(exact), tl.bfloat16)

    for function in (binary_op, unary_op, ternary_op, cast_impl, create_fp_to_fp, create_dot, create_fma):
        setattr(_Builder, function.__name__, function)
    _fix_reductions()


def _fix_reductions() -> None:
    """Reductions and scans run numpy on the data: bfloat16 ones go through float32."""
    stock = interpreter.ReduceScanOpInterface.apply

    def apply(self, values):
        single = isinstance(values, tl.core.tensor)
        values = (values,) if single else values
        narrow = [isinstance(v, tl.core.tensor) and _is_bf16(v.handle) for v in values]
        if any(narrow):
            values = tuple(
                self.to_tensor(to_float(v.handle.data), tl.float32) if n else v
                for v, n in zip(values, narrow, strict=True)
            )
        results = list(stock(self, values))
        for i, was_narrow in enumerate(narrow[: len(results)]):
            if was_narrow:
                results[i] = self.to_tensor(to_bits(results[i].handle.data), tl.bfloat16)
        return results[0] if single else tuple(results)

    interpreter.ReduceScanOpInterface.apply = apply


# ---- memory ----------------------------------------------------------------------------------------------------------


class _Memory:
    """What the launch in progress may touch, and which program has written what."""

    def __init__(self):
        self.start = self.end = np.zeros(0, np.uint64)
        self.writers: dict[int, tuple] = {}

    def allow(self, tensors) -> None:
        """Spans of the tensors themselves, not of their storages: running off a view into its neighbour shows."""
        spans = []
        for tensor in tensors:
            if tensor.numel():
                start = tensor.data_ptr()
                reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                spans.append((start, start + (reach + 1) * tensor.element_size()))
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.start = np.array([s for s, _ in merged], np.uint64)
        self.end = np.array([e for _, e in merged], np.uint64)
        self.writers.clear()

    def check(self, kind: str, program, pointers, mask, size: int) -> None:
        pointers, mask = np.broadcast_arrays(np.atleast_1d(pointers), np.atleast_1d(mask))
        taken = pointers[mask.astype(bool)]
        if not taken.size:
            return
        program = tuple(int(i) for i in program)
        span = np.searchsorted(self.start, taken, side="right").astype(np.int64) - 1
        bad = span < 0
        if self.end.size:
            bad |= taken + np.uint64(size) > self.end[np.maximum(span, 0)]
        if bad.any():
            place = int(taken[bad][0])
            edges = [abs(place - int(e)) for e in (*self.start, *self.end)]
            near = f", {min(edges)} bytes from the nearest edge of a tensor" if edges else ""
            raise AccessError(f"{kind} out of bounds: {bad.sum()} of {taken.size} lanes, program {program}{near}")
        if (taken % np.uint64(size)).any():
            raise AccessError(f"misaligned {kind}, program {program}")
        if kind == "store" and np.unique(taken).size != taken.size:
            raise AccessError(f"store of two lanes to one address, program {program}")
        for address in taken.tolist() if kind == "store" or self.writers else ():
            other = self.writers.get(address)
            if other is not None and other != program:
                raise AccessError(f"{kind} at an address that program {other} wrote, program {program}")
            if kind == "store":
                self.writers[address] = program


_memory = _Memory()


def _add_checks() -> None:
    init, load, store = _Executor._init_args_hst, _Builder.create_masked_load, _Builder.create_masked_store

    def _init_args_hst(self, args, kwargs):
        found = init(self, args, kwargs)
        _memory.allow(v for group in (found[0], found[1].values()) for v in group if hasattr(v, "data_ptr"))
        return found

    def size_of(pointers) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def create_masked_load(self, pointers, mask, *rest):
        _memory.check("load", self.grid_idx, pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        _memory.check("store", self.grid_idx, pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self, op, *rest):
        raise AccessError("an atomic: the kernels of this package are deterministic and use none")

    _Executor._init_args_hst = _init_args_hst
    for function in (create_masked_load, create_masked_store, create_atomic_rmw):
        setattr(_Builder, function.__name__, function)


_installed = False


def install() -> None:
    """Changes the interpreter of this process. Later calls do nothing."""
    global _installed
    if not _installed:
        _fix_arithmetic()
        _add_checks()
        _installed = True
