"""The numpy module: codec, record format and SIMD level; also with torch out of reach."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import faiss_books
import numpy as np
import pytest
import torch

from memory3_kernels import _load, numpy_api

pytestmark = pytest.mark.skipif(
    os.environ.get("M3_NATIVE") == "0", reason="M3_NATIVE=0: this run covers the references"
)
ID = bytes(range(16))


@pytest.fixture(scope="module")
def index():
    return faiss_books.trained("OPQ4_32,Residual2x5,PQ4x7", 32, count=300)


@pytest.fixture(scope="module")
def tables(index):
    book = faiss_books.book_of(index)
    return [t.numpy() for t in book]


def test_module_is_built():
    assert numpy_api.unavailable_reason() is None


def test_decodes_like_faiss(index, tables):
    codes = index.sa_encode(faiss_books.random_vectors(64, 32, seed=2))
    assert numpy_api.code_bytes(*tables[:2]) == codes.shape[1] == 6
    wanted = index.sa_decode(codes)
    actual = numpy_api.vq_dequantize(codes.reshape(2, 32, 6), *tables)
    assert actual.shape == (2, 32, 32) and actual.dtype == np.float32
    assert np.abs(actual.reshape(64, 32) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    strided = np.zeros((64, 12), np.uint8)
    strided[:, ::2] = codes
    assert np.array_equal(numpy_api.vq_dequantize(strided[:, ::2], *tables), actual.reshape(64, 32))


def test_half_tables_and_half_results(index, tables):
    codes = index.sa_encode(faiss_books.random_vectors(8, 32, seed=3))
    coarse, fine, rot = tables
    wanted = numpy_api.vq_dequantize(codes, coarse, fine, rot)
    scale = np.abs(wanted).max()
    result = numpy_api.vq_dequantize(codes, coarse, fine, rot, dtype="float16")
    assert result.dtype == np.float16 and 0 < np.abs(result - wanted).max() < 1e-3 * scale
    result = numpy_api.vq_dequantize(codes, coarse.astype(np.float16), fine.astype(np.float16), rot)
    assert result.dtype == np.float32 and 0 < np.abs(result - wanted).max() < 4e-3 * scale
    rotated = numpy_api.vq_dequantize(codes, coarse, fine)
    assert np.allclose(rotated @ rot, wanted, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": np.zeros((3, 5), np.uint8)}, r"codes: expected uint8 \[..., 6\], got uint8 \[3, 5\]"),
        ({"codes": np.zeros((3, 6), np.int32)}, "codes: expected uint8 .* got int32"),
        ({"coarse": np.zeros((2, 33, 16), np.float32)}, r"coarse: expected 2\^4 to 2\^14 entries, got 33"),
        ({"coarse": np.zeros((3, 32, 16), np.float32)}, r"coarse: expected shape \[2, 2\^b, D/2\]"),
        ({"coarse": np.zeros((2, 32, 16))}, "coarse: expected a 3-dimensional float32 or float16 array, got float64"),
        ({"fine": np.zeros((4, 128, 9), np.float32)}, "fine: expected pieces that make up 32 values together"),
        ({"fine": np.zeros((4, 128, 8), np.float16)}, "fine: expected the dtype of coarse, got float16"),
        (
            {"rot": np.zeros((32, 31), np.float32)},
            r"rot: expected float32 \[D, D\] with D = 32, got float32 \[32, 31\]",
        ),
        ({"dtype": "bfloat16"}, "dtype: expected float32 or float16, got bfloat16"),
    ],
)
def test_refuses_bad_arguments(tables, change, message):
    arguments = {"codes": np.zeros((3, 6), np.uint8)} | dict(zip(("coarse", "fine", "rot"), tables, strict=True))
    with pytest.raises(ValueError, match=message):
        numpy_api.vq_dequantize(**(arguments | change))


def packed(bias=True, coded=False, **options):
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((2, 2, 3, 4, 8)).astype(np.float16)
    pos = rng.integers(0, 128, (2, 3, 4)).astype(np.uint16)
    weights = rng.standard_normal((2, 3, 4)).astype(np.float32) if bias else None
    if coded:
        kv = rng.integers(0, 256, (2, 2, 3, 64)).astype(np.uint8)
    value = numpy_api.pack_record(ID, kv, pos, n_valid=3, n_tokens=77, bias=weights, coded=coded, **options)
    return value, kv, pos, weights


@pytest.mark.parametrize("bias, coded", [(True, False), (False, False), (False, True)])
def test_record_round_trip(bias, coded):
    value, kv, pos, weights = packed(bias, coded)
    record = numpy_api.parse_record(value)
    assert record[:4] == (ID, 3, 77, coded)
    assert np.array_equal(record.kv.view(kv.dtype).reshape(kv.shape), kv)
    assert np.array_equal(record.pos.reshape(pos.shape), pos)
    assert (record.bias is None) == (weights is None)
    if bias:
        assert np.array_equal(record.bias.reshape(pos.shape), weights)
    assert not record.kv.flags.writeable and not record.kv.flags.owndata
    del value
    assert record.kv.tobytes() == kv.tobytes()  # the views keep the bytes alive


def test_head_is_the_documented_one():
    """Field by field, against struct and zlib."""
    value, kv, pos, weights = packed()
    head = struct.unpack("<4sHHHHIQQ16sIIII", value[:64])
    body = kv.tobytes() + pos.tobytes() + weights.tobytes()
    assert value[64:] == body
    sizes = (len(body), kv.nbytes, ID, pos.nbytes, weights.nbytes, 0)
    assert head == (b"M3RC", 1, 2, 3, 77, zlib.crc32(body), *sizes, zlib.crc32(value[:60]))


def reseal(value: bytes, offset: int, form: str, number: int) -> bytes:
    """The record with one field of its head changed and the head's checksum made right again."""
    raw = bytearray(value)
    struct.pack_into(form, raw, offset, number)
    struct.pack_into("<I", raw, 60, zlib.crc32(bytes(raw[:60])))
    return bytes(raw)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda v: v[:40], "expected a head of 64 bytes, got 40"),
        (lambda v: b"X" + v[1:], "magic"),
        (lambda v: v[:9] + b"\xff" + v[10:], "checksum of its head"),
        (lambda v: v[:-5] + b"\xff" + v[-4:], "checksum of its body"),
        (lambda v: v[:-1], "bytes of body"),
        (lambda v: v + b"\0", "bytes of body"),
        (lambda v: reseal(v, 4, "<H", 9), "expected version 1, got 9"),
        (lambda v: reseal(v, 6, "<H", 8), "unknown flags 8"),
        (lambda v: reseal(v, 6, "<H", 0), "its bias has 96 bytes"),
        (lambda v: reseal(v, 24, "<Q", 1 << 63), "bytes of body"),
    ],
)
def test_damaged_records_are_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        numpy_api.parse_record(damage(packed()[0]))


def test_body_checksum_can_be_skipped():
    value = bytearray(packed()[0])
    value[70] ^= 1
    with pytest.raises(ValueError, match="body"):
        numpy_api.parse_record(value)
    assert numpy_api.parse_record(value, check_body=False).n_valid == 3


def test_pack_refuses_bad_arguments():
    kv, pos = np.zeros((1, 2, 1, 2, 8), np.float16), np.zeros((1, 1, 2), np.uint16)
    good = {"record_id": ID, "kv": kv, "pos": pos, "n_valid": 2, "n_tokens": 2}
    for change, message in [
        ({"record_id": b"short"}, "record_id: expected 16 bytes, got 5"),
        ({"pos": pos.astype(np.int32)}, "pos: expected uint16, got int32"),
        ({"n_valid": -1}, "n_valid: expected 0..65535, got -1"),
        ({"n_tokens": 65536}, "n_tokens: expected 0..65535, got 65536"),
        ({"bias": np.zeros(3, np.float32)}, "bias: expected float32, one per entry of pos"),
    ]:
        with pytest.raises(ValueError, match=message):
            numpy_api.pack_record(**(good | change))


def test_level_is_shared_with_torch():
    before = numpy_api.simd_level()
    try:
        numpy_api.set_simd_level("none")
        assert numpy_api.simd_level() == "none"
        if _load.native_reason() is None:
            assert _load.simd_level() == "none"
        with pytest.raises(ValueError, match="expected none, avx2, avx512, avx512bf16 or amx, got sse9"):
            numpy_api.set_simd_level("sse9")
    finally:
        numpy_api.set_simd_level(before)


def run_python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from memory3_kernels import numpy_api
zeros = np.zeros((2, 16, 4), np.float32), np.ones((2, 16, 4), np.float32)
print(numpy_api.vq_dequantize(np.zeros((1, 2), np.uint8), *zeros).tolist(), "torch" in repr(sys.modules.get("torch")))
import memory3_kernels
try:
    memory3_kernels.select_tokens
except ImportError as error:
    print(error)
"""
    first, second = run_python(code).splitlines()
    assert first == f"{[[1.0] * 8]} False"
    assert "memory3_kernels.select_tokens needs torch, which is not installed" in second


def test_missing_module_says_what_to_do():
    code = """
import sys
sys.modules["memory3_kernels._numpy"] = None
from memory3_kernels import numpy_api
try:
    numpy_api.simd_level()
except ImportError as error:
    print(error)
"""
    assert "memory3_kernels._numpy is not built" in run_python(code)


def test_parses_what_the_bank_writes():
    """The record of memory3.bank and this module's are one format."""
    from memory3.bank import format

    layout = format.Layout(layers=2, heads=1, tokens=4, head_dim=8, dtype=torch.float16)
    kv, pos = torch.randn(layout.kv_shape).half(), torch.arange(8, dtype=torch.int32).view(layout.pos_shape)
    value = format.pack_record(ID, layout, kv, pos, 4, 9, torch.randn(layout.pos_shape))
    record = numpy_api.parse_record(value)
    assert torch.equal(torch.from_numpy(record.kv.view(np.float16).copy()).view(layout.kv_shape), kv)
    again = numpy_api.pack_record(
        ID, kv.numpy(), record.pos, n_valid=record.n_valid, n_tokens=record.n_tokens, bias=record.bias
    )
    assert again == value
