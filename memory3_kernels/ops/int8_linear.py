"""int8_linear: a linear map with bytes on both sides, bias, and GELU (docs/ops/int8_linear.md).

    u = round(x / s) + z,  s = (high - low) / 255,  z = round(-low / s)      per row of x, low <= 0 <= high
    out = s d (sum of u q - z sum of q) + bias                               q, d: int8 weight, scale per row
Dynamic quantisation per token: Yao et al., ZeroQuant (arXiv 2206.01861); here asymmetric. Sums are exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import BadCase, Case, Op, register
from ..int8 import MOST_COLS, Int8Weight, dequantise_weight, quantise_weight, tile_bytes
from ._linear_args import check_weight, columns, cost

SCHEMA = "(Tensor x, Tensor weight, *, int rows, bool gelu, ScalarType out_dtype) -> Tensor"


def _check(x: Tensor, weight: Tensor, rows: int, out_dtype: torch.dtype) -> int:
    cols = columns(x)
    torch._check(cols <= MOST_COLS, lambda: f"x: expected at most {MOST_COLS} columns, got {cols}")
    check_weight(weight, rows, cols, tile_bytes(cols), out_dtype)
    return cols


def fake(x: Tensor, weight: Tensor, *, rows: int, gelu: bool, out_dtype: torch.dtype) -> Tensor:
    _check(x, weight, rows, out_dtype)
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., cols] -> (u of 0..255 [..., cols], scale [..., 1], zero [..., 1]), all float32: in that type, whatever
    comes in, since another one would round other values up."""
    x = x.to(torch.float32)
    if not x.shape[-1]:
        return x, x.new_zeros((*x.shape[:-1], 1)), x.new_zeros((*x.shape[:-1], 1))
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    width = high - low
    inverse = torch.where(width > 0, 255 / width, 0)
    zero = (-low * inverse).round()
    return ((x * inverse).round() + zero).clamp(0, 255), width / 255, zero


def reference(x: Tensor, weight: Tensor, *, rows: int, gelu: bool, out_dtype: torch.dtype) -> Tensor:
    cols = _check(x, weight, rows, out_dtype)
    values, scale, bias = dequantise_weight(weight, rows, cols, torch.float64)
    u, width, zero = (part.double() for part in quantise_rows(x))
    out = width * (scale * ((u - zero) @ values.T)) + bias
    return (F.gelu(out) if gelu else out).to(out_dtype)


def _sample(lead: tuple[int, ...], rows: int, cols: int, gelu: bool = False, shift: float = 0.0):
    def make(dtype: torch.dtype, generator: torch.Generator):
        x = (torch.randn(*lead, cols, generator=generator) + shift).to(dtype)
        weight = torch.randn(rows, cols, generator=generator) / max(cols, 1) ** 0.5
        packed = quantise_weight(weight, torch.randn(rows, generator=generator))
        return (x, packed.data), {"rows": rows, "gelu": gelu, "out_dtype": dtype}

    return make


def _constant(dtype: torch.dtype, generator: torch.Generator):
    """Rows of zeros, of one value above and one below."""
    x = torch.tensor([0.0, 2.0, -3.0])[:, None].expand(3, 40).to(dtype)
    packed = quantise_weight(torch.randn(18, 40, generator=generator))
    return (x, packed.data), {"rows": 18, "gelu": False, "out_dtype": dtype}


def cases():
    for gelu in (False, True):
        name = "-gelu" if gelu else ""
        yield Case(f"M1_N48_K64{name}", _sample((1,), 48, 64, gelu))
        yield Case(f"M3_N33_K100-tails{name}", _sample((3,), 33, 100, gelu))
        yield Case(f"M15_N16_K160{name}", _sample((3, 5), 16, 160, gelu))
        yield Case(f"M131_N150_K61{name}", _sample((131,), 150, 61, gelu))
    yield Case("M17_N40_K1056-shifted", _sample((17,), 40, 1056, shift=3.0))
    yield Case("M33_N81_K64-negative", _sample((33,), 81, 64, shift=-9.0))
    yield Case("constant-rows", _constant)
    yield Case("vector", _sample((), 16, 32))
    yield Case("M0", _sample((0,), 16, 32))
    yield Case("N0", _sample((2,), 0, 32))
    yield Case("K0", _sample((2,), 20, 0))
    yield Case("M1366_N1152_K384", _sample((1366,), 1152, 384), slow=True, bench=True)
    yield Case("M1366_N1536_K384-gelu", _sample((1366,), 1536, 384, True), slow=True, bench=True)
    yield Case("M1366_N384_K1536", _sample((1366,), 384, 1536), slow=True, bench=True)


def bad_cases():
    def broken(x=None, weight=None, **changes):
        def make():
            packed = quantise_weight(torch.ones(20, 32))
            args = (torch.ones(2, 32) if x is None else x, packed.data if weight is None else weight)
            return args, {"rows": 20, "gelu": False, "out_dtype": torch.float32, **changes}

        return make

    yield BadCase("rows", broken(rows=33), r"weight: expected shape \[3, 1216\] for 33 rows of 32, got \[2, 1216\]")
    yield BadCase("cols", broken(torch.ones(2, 65)), r"weight: expected shape \[2, 2240\] for 20 rows of 65, got")
    yield BadCase("weight-dtype", broken(weight=torch.zeros(2, 1216)), "weight: expected .*(uint8|Byte)")
    yield BadCase("out-dtype", broken(out_dtype=torch.int32), "out_dtype: expected float32, bfloat16 or float16, got")


OP = register(
    Op(
        name="int8_linear",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    )
)


def int8_linear(x: Tensor, weight: Int8Weight, gelu: bool = False, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times an int8 weight, transposed, plus its bias; no gradient (docs/ops/int8_linear.md).

    Args:
        x: [..., cols], float32, bfloat16 or float16, finite; each row is rounded to 256 levels between its least and
            its largest value (or zero).
        weight: of `quantise_weight`.
        gelu: GELU (by the error function) of the result.
        out_dtype: of the result; default that of x.

    Returns:
        [..., rows], contiguous.

    Raises:
        RuntimeError: shapes or dtypes do not match, or x requires a gradient.
    """
    return OP(x, weight.data, weight.rows, gelu, out_dtype or x.dtype)
