"""Packed weights against GGUF's own blocks, and against the dense weights they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from memory3_kernels import join_weights, pack_blocks, pack_weight, packed_linear, unpack_weight
from memory3_kernels.packed import round_activations

gguf = pytest.importorskip("gguf")
TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}
FILE_TYPES = {**TYPES, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def dense(packed) -> torch.Tensor:
    return unpack_weight(packed.data, packed.rows, packed.cols, packed.format)


@pytest.mark.parametrize("format", FILE_TYPES)
@pytest.mark.parametrize("rows", [16, 37])
def test_gguf_blocks_keep_every_value(format, rows):
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).numpy()
    blocks = gguf.quants.quantize(weight, FILE_TYPES[format])
    packed = pack_blocks(torch.from_numpy(blocks), format)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, FILE_TYPES[format]))
    # d q - 8 d rounds once more than d (q - 8)
    assert torch.equal(dense(packed), theirs) or format == "q4_0" and torch.allclose(dense(packed), theirs, rtol=1e-5)


@pytest.mark.parametrize("format", TYPES)
def test_own_quantisation_is_gguf_s(format):
    """Same rules as the reference implementation; ties and the last bit of a scale may fall differently."""
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(1))
    theirs = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), TYPES[format]), TYPES[format])
    )
    ours = dense(pack_weight(weight, format))
    assert (ours - theirs).norm() / theirs.norm() < 2e-3
    assert (ours - weight).norm() <= 1.001 * (theirs - weight).norm()


def test_bf16_is_exact():
    weight = torch.randn(33, 64).bfloat16()
    assert torch.equal(dense(pack_weight(weight)), weight.float())


def test_a_row_of_zeros_or_of_one_value_stays():
    weight = torch.zeros(3, 64)
    weight[1] = 2.5
    for format in TYPES:
        packed = pack_weight(weight, format)
        assert torch.allclose(dense(packed), weight, rtol=1e-3)
        assert torch.isfinite(packed_linear(torch.ones(1, 64), packed)).all()


def test_sizes_in_bits_per_weight():
    weight = torch.randn(160, 576)
    bits = {format: 8 * pack_weight(weight, format).nbytes / weight.numel() for format in ("bf16", "q8_0", "q4_1")}
    assert bits == {"bf16": 16, "q8_0": 8.5, "q4_1": 5}


def test_results_do_not_depend_on_the_batch():
    """Few rows and many rows take different paths: the same numbers up to the order of float32 sums."""
    weight = pack_weight(torch.randn(80, 1536, generator=torch.Generator().manual_seed(2)), "q4_1")
    x = torch.randn(40, 1536, generator=torch.Generator().manual_seed(3))
    together = packed_linear(x, weight)
    for count in (1, 2, 4, 8, 15):
        assert torch.allclose(packed_linear(x[:count], weight), together[:count], rtol=1e-4, atol=1e-3)


def test_mxint8_is_the_nearest_of_its_values():
    """Against a search: every value of a block at its scale, for blocks of all sizes."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(50, 32, generator=draw) * 2.0 ** torch.randint(-30, 30, (50, 1), generator=draw)
    rounded = round_activations(x, "mxint8")
    assert torch.equal(rounded, rounded.bfloat16().float())
    for values, got in zip(x, rounded, strict=True):
        top = 2.0 ** math.floor(math.log2(values.abs().max()))
        grid = torch.arange(-127, 128) * top / 64
        distance = (values[:, None] - grid).abs().amin(1)
        assert torch.equal((values - got).abs(), distance)
    assert torch.equal(round_activations(torch.zeros(2, 32), "mxint8"), torch.zeros(2, 32))
    assert torch.equal(round_activations(rounded, "mxint8"), rounded)


@pytest.mark.parametrize("format", TYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_mxint8_equals_bf16_on_its_own_values(format, count):
    """Such values are bf16 values: both kinds of activations give the same products, whatever kernel makes them."""
    weight = torch.randn(40, 288, generator=torch.Generator().manual_seed(5))
    x = round_activations(torch.randn(count, 288, generator=torch.Generator().manual_seed(6)), "mxint8")
    exact, bytes_ = (packed_linear(x, pack_weight(weight, format, kind)) for kind in ("bf16", "mxint8"))
    assert torch.allclose(bytes_, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**112])
@pytest.mark.parametrize("format", TYPES)
@pytest.mark.parametrize("count", [1, 40])
def test_mxint8_keeps_what_is_not_finite(format, count, bad):
    x = torch.ones(count, 64)
    x[0, 40] = bad
    out = packed_linear(x, pack_weight(torch.randn(20, 64), format, "mxint8"))
    assert out[0].isnan().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-16, 1e30])
@pytest.mark.parametrize("format", TYPES)
def test_mxint8_of_tiny_and_huge_values(format, scale):
    weight, x = pack_weight(torch.randn(20, 64) / 64, format, "mxint8"), torch.full((9, 64), scale)
    want = round_activations(x.double(), "mxint8") @ dense(weight).double().T
    assert torch.allclose(packed_linear(x, weight).double(), want, rtol=1e-4, atol=0 if scale > 1 else 1e-38)


@pytest.mark.parametrize("count", [1, 40])
def test_mxint8_with_scales_that_are_no_scales(count):
    """Blocks of one value have d = 0, a corrupt file may have NaN: products of bytes do arithmetic on its exponent."""
    weight = torch.randn(20, 64)
    weight[3] = 0.75
    packed = pack_weight(weight, "q4_1", "mxint8")
    x = round_activations(torch.randn(count, 64), "mxint8")
    assert torch.allclose(packed_linear(x, packed), x @ dense(packed).T, rtol=1e-4, atol=1e-5)
    scales = packed.data[:, 2 * 256 :].view(torch.float16)  # [tile, block, d or m, row]
    scales[0, 5] = torch.nan
    scales[0, 7] = torch.inf
    out = packed_linear(x, packed)
    assert not out[:, [5, 7]].isfinite().any() and out[:, [0, 3, 6, 19]].isfinite().all()


def test_weights_of_one_call_share_their_activations():
    weight = torch.ones(16, 32)
    mixed = [pack_weight(weight, "q8_0"), pack_weight(weight, "q4_1", "mxint8")]
    with pytest.raises(RuntimeError, match="weights: expected one kind of activations, got bf16 and mxint8"):
        join_weights(mixed)
    assert join_weights([pack_weight(weight), mixed[1]])[0].activations == "mxint8"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_weight(torch.ones(4, 33)), "weight: expected a multiple of 32 columns, got 33"),
        (lambda: pack_weight(torch.ones(4, 32), "q2_k"), "format: expected one of bf16, q8_0, q4_1, got q2_k"),
        (lambda: pack_weight(torch.ones(4, 32), "q8_0", "fp8"), "activations: expected one of bf16, mxint8, got fp8"),
        (lambda: pack_weight(torch.ones(32)), r"weight: expected \[rows, cols\], got \[32\]"),
        (lambda: pack_blocks(torch.zeros(4, 33, dtype=torch.uint8), "q8_0"), "a multiple of 34"),
        (lambda: pack_blocks(torch.zeros(4, 34), "q8_0"), "expected uint8"),
        (lambda: pack_blocks(torch.zeros(4, 64, dtype=torch.uint8), "bf16"), "expected q8_0, q4_1 or q4_0, got bf16"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
