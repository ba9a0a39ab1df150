"""packed_linear: the linear layer of inference, on weights packed for it (docs/ops/packed_linear.md).

    out = round(x) W^T,   W = q (bf16),  d q (q8_0)  or  d q + m (q4_1), d and m per row and 32 columns
Activations are rounded to bfloat16, or to 8 bits and a power of two per 32 columns (OCP Microscaling v1.0, MXINT8);
products are exact and summed in float32. Block formats: GGUF (ggml).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Op, register
from ..packed import (
    BLOCK,
    PackedWeight,
    check_activations,
    check_format,
    pack_weight,
    round_activations,
    tile_bytes,
    unpack_weight,
)
from ._linear_args import check_weight, columns, cost

SCHEMA = "(Tensor x, Tensor weight, *, str format, str activations, int rows, ScalarType out_dtype) -> Tensor"


def _check(x: Tensor, weight: Tensor, format: str, activations: str, rows: int, out_dtype: torch.dtype) -> int:
    check_format(format)
    check_activations(activations)
    torch._check(
        activations == "bf16" or format != "bf16",
        lambda: f"activations: expected bf16 for weights in bf16, got {activations}",
    )
    cols = columns(x)
    torch._check(cols % BLOCK == 0, lambda: f"x: expected a multiple of {BLOCK} columns, got {cols}")
    check_weight(weight, rows, cols, tile_bytes(cols, format), out_dtype, f" in {format}")
    return cols


def fake(
    x: Tensor, weight: Tensor, *, format: str, activations: str, rows: int, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    _check(x, weight, format, activations, rows, out_dtype)
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)


def reference(
    x: Tensor, weight: Tensor, *, format: str, activations: str, rows: int, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    cols = _check(x, weight, format, activations, rows, out_dtype)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    out = round_activations(x.to(wide), activations) @ unpack_weight(weight, rows, cols, format, wide).T
    return out.to(out_dtype)


def _sample(lead: tuple[int, ...], rows: int, cols: int, format: str, activations: str = "bf16"):
    def make(dtype: torch.dtype, generator: torch.Generator):
        x = torch.randn(*lead, cols, generator=generator, dtype=torch.float32).to(dtype)
        weight = torch.randn(rows, cols, generator=generator, dtype=torch.float32) + 0.25
        packed = pack_weight(weight, format)
        return (x, packed.data), {"format": format, "activations": activations, "rows": rows, "out_dtype": dtype}

    return make


def cases():
    for kind in (("bf16",), ("q8_0",), ("q4_1",), ("q8_0", "mxint8"), ("q4_1", "mxint8")):
        name = "-".join(kind)
        yield Case(f"M1_N48_K64-{name}", _sample((1,), 48, 64, *kind))
        yield Case(f"M2_N20_K32-tail-{name}", _sample((2,), 20, 32, *kind))
        yield Case(f"M3_N33_K96-{name}", _sample((3,), 33, 96, *kind))
        yield Case(f"M15_N16_K160-{name}", _sample((3, 5), 16, 160, *kind))
        yield Case(f"M17_N49_K1056-panels-{name}", _sample((17,), 49, 1056, *kind))
        yield Case(f"M131_N40_K64-{name}", _sample((131,), 40, 64, *kind))
        yield Case(f"M0-{name}", _sample((0,), 16, 32, *kind))
        for count in (1, 8, 128):
            yield Case(f"M{count}_N3072_K576-{name}", _sample((count,), 3072, 576, *kind), slow=True, bench=True)
    yield Case("vector-q8_0", _sample((), 16, 32, "q8_0"))
    yield Case("N0", _sample((2,), 0, 32, "bf16"))


def bad_cases():
    def broken(x=None, weight=None, **changes):
        def make():
            packed = pack_weight(torch.ones(20, 32), "q8_0")
            args = (torch.ones(2, 32) if x is None else x, packed.data if weight is None else weight)
            return args, {
                "format": "q8_0", "activations": "bf16", "rows": 20, "out_dtype": torch.float32, **changes,
            }  # fmt: skip

        return make

    yield BadCase("format", broken(format="q5_k"), "format: expected one of bf16, q8_0, q4_1, got q5_k")
    yield BadCase("activations", broken(activations="int4"), "activations: expected .*bf16.* got int4")
    yield BadCase(
        "activations-of-bf16", broken(format="bf16", activations="mxint8"),
        "activations: expected bf16 for weights in bf16, got mxint8",
    )  # fmt: skip
    yield BadCase("cols", broken(torch.ones(2, 33)), "x: expected a multiple of 32 columns, got 33")
    yield BadCase(
        "rows", broken(rows=33), r"weight: expected shape \[3, 576\] for 33 rows of 32 in q8_0, got \[2, 576\]"
    )
    yield BadCase("other-cols", broken(torch.ones(2, 64)), r"weight: expected shape \[2, 1088\] for 20 rows of 64")
    yield BadCase("weight-dtype", broken(weight=torch.zeros(2, 576)), "weight: expected .*(uint8|Byte)")
    yield BadCase("out-dtype", broken(out_dtype=torch.int32), "out_dtype: expected float32, bfloat16 or float16, got")


OP = register(
    Op(
        name="packed_linear",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    )
)


def packed_linear(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times a packed weight, transposed; no bias, no gradient (docs/ops/packed_linear.md).

    Args:
        x: [..., cols], float32, bfloat16 or float16; rounded as the weight's `activations` say.
        weight: of `pack_weight` or `pack_blocks`.
        out_dtype: of the result; default that of x.

    Returns:
        [..., rows], contiguous.

    Raises:
        RuntimeError: shapes or dtypes do not match, or x requires a gradient.
    """
    return OP(x, weight.data, weight.format, weight.activations, weight.rows, out_dtype or x.dtype)
