"""Bytes of records, references and embeddings: round trips, layout as documented, and damage that never passes."""

import struct
import zlib

import numpy as np
import pytest
import torch
from bank_fake import IDENTITY, identity, memory_of
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.bank.errors import RecordCorrupt
from memory3.bank.format import (
    HEAD_BYTES,
    Layout,
    Reference,
    check_embeddings,
    pack_embedding,
    pack_record,
    pack_reference,
    read_head,
    unpack_embedding,
    unpack_record,
    unpack_reference,
)

ID = bytes(range(16))
DTYPES = ["float32", "bfloat16", "float16"]


@st.composite
def records(draw):
    size = st.integers(1, 3)
    layout = Layout(
        draw(size), draw(size), draw(st.integers(1, 5)), 8 * draw(size), getattr(torch, draw(st.sampled_from(DTYPES)))
    )
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n_valid = draw(st.integers(0, layout.tokens))
    kv = torch.randn(layout.kv_shape, generator=seed).to(layout.dtype)
    kv[..., n_valid:, :] = 0
    pos = torch.randint(-1, 0xFFFF, layout.pos_shape, generator=seed, dtype=torch.int32)
    bias = torch.randn(layout.pos_shape, generator=seed) if draw(st.booleans()) else None
    return layout, kv, pos, n_valid, draw(st.integers(0, 0xFFFF)), bias


@settings(max_examples=60, deadline=None)
@given(records())
def test_record_round_trip(record):
    layout, kv, pos, n_valid, n_tokens, bias = record
    back = unpack_record(ID, pack_record(ID, layout, kv, pos, n_valid, n_tokens, bias), layout)
    assert torch.equal(back.kv.view(torch.uint8), kv.view(torch.uint8))
    assert torch.equal(back.pos, pos) and (back.n_valid, back.n_tokens) == (n_valid, n_tokens)
    assert (back.bias is None) == (bias is None) and (bias is None or torch.equal(back.bias, bias))


@settings(max_examples=150, deadline=None)
@given(records(), st.data())
def test_a_damaged_record_is_refused_or_equal(record, data):
    layout, kv, pos, n_valid, n_tokens, bias = record
    value = bytearray(pack_record(ID, layout, kv, pos, n_valid, n_tokens, bias))
    whole = bytes(value)
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(0, 255))
    elif kind == "cut":
        del value[data.draw(st.integers(0, len(value))) :]
    elif kind == "grow":
        value += data.draw(st.binary(max_size=64))
    else:
        value = bytearray(data.draw(st.binary(max_size=200)))
    try:
        back = unpack_record(ID, bytes(value), layout)
    except RecordCorrupt as error:
        assert bytes(value) != whole and ID.hex() in str(error)
    else:
        assert bytes(value) == whole and torch.equal(back.pos, pos)


def test_bytes_are_as_documented():
    layout = Layout.of(IDENTITY)
    memory = memory_of([5, 6, 7], "", bias=True)
    value = pack_record(ID, layout, memory.kv, memory.pos, memory.n_valid, 3, memory.bias)
    magic, version, flags, n_valid, n_tokens, crc, body, kv = struct.unpack_from("<4sHHHHIQQ", value)
    assert (magic, version, flags, n_valid, n_tokens) == (b"M3RC", 1, 2, 3, 3)
    assert value[32:48] == ID and crc == zlib.crc32(value[64:]) and len(value) == 64 + body
    # 3 layers, 2 planes, 2 heads, 4 tokens of 16 bf16 numbers
    assert kv == 3 * 2 * 2 * 4 * 16 * 2
    second_key = np.frombuffer(value, "<u2", 16, 64 + 16 * 2)
    assert second_key.tolist() == memory.kv[0, 0, 0, 1].view(torch.uint16).tolist()
    value_plane = np.frombuffer(value, "<u2", 16, 64 + 2 * 4 * 16 * 2)
    assert value_plane.tolist() == memory.kv[0, 1, 0, 0].view(torch.uint16).tolist()
    assert np.frombuffer(value, "<u2", 4, 64 + kv).tolist() == [0, 1, 2, 0xFFFF]
    assert np.frombuffer(value, "<f4", 1, 64 + kv + 2 * 24)[0] == memory.bias[0, 0, 0]


def test_coded_layout():
    layout = Layout.of(identity(tokens=8), 14)
    assert layout.row_bytes == 112 and layout.codes_shape == (3, 2, 2, 112)
    assert Layout.of(identity(tokens=3), 10).row_bytes == 32
    codes = torch.randint(0, 256, layout.codes_shape, dtype=torch.uint8)
    pos = torch.zeros(layout.pos_shape, dtype=torch.int32)
    value = pack_record(ID, layout, codes, pos, 8, 100, None)
    assert torch.equal(unpack_record(ID, value, layout).kv, codes)
    with pytest.raises(RecordCorrupt, match="sizes"):
        unpack_record(ID, value, Layout.of(identity(tokens=8)))


def test_rows_after_n_valid_are_stored_as_zero():
    layout = Layout.of(IDENTITY)
    kv = torch.full(layout.kv_shape, float("nan"), dtype=torch.bfloat16)
    kv[..., :2, :] = 1
    back = unpack_record(ID, pack_record(ID, layout, kv, torch.zeros(layout.pos_shape).int(), 2, 2, None), layout)
    assert bool((back.kv[..., :2, :] == 1).all()) and bool((back.kv[..., 2:, :] == 0).all())
    assert bool(kv[..., 2:, :].isnan().all()), "the caller's tensor must not change"


def test_a_record_under_another_id_is_refused():
    layout = Layout.of(IDENTITY)
    memory = memory_of([1, 2, 3, 4])
    value = pack_record(ID, layout, memory.kv, memory.pos, 4, 4, None)
    with pytest.raises(RecordCorrupt, match="belongs to"):
        read_head(b"x" * 16, value, layout)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_valid": 5}, "n_valid"),
        ({"n_tokens": 70000}, "n_tokens"),
        ({"pos": torch.full((3, 2, 4), 0xFFFF)}, "pos"),
        ({"pos": torch.zeros(1)}, "pos"),
        ({"kv": torch.zeros(3, 2, 2, 4, 16)}, "kv"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_pack_names_what_does_not_fit(change, message):
    memory = memory_of([1, 2, 3, 4])
    given_ = {"kv": memory.kv, "pos": memory.pos, "n_valid": 4, "n_tokens": 4, "bias": None} | change
    with pytest.raises(ValueError, match=message):
        pack_record(ID, Layout.of(IDENTITY), **given_)


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=50), st.lists(st.integers(0, 2**32 - 1), max_size=9), st.text(max_size=9), st.binary(max_size=80)
)
def test_reference_round_trip_and_noise(text, tokens, title, noise):
    reference = Reference(ID, text, tokens, title, "s")
    value = pack_reference(reference)
    assert unpack_reference(ID, value) == reference
    for bad in (noise, value[:-1], value + b"x", value[:8] + noise + value[8:]):
        if bad != value:
            with pytest.raises(RecordCorrupt):
                unpack_reference(ID, bad)
    with pytest.raises(RecordCorrupt):
        unpack_reference(b"y" * 16, value)


def test_embedding_round_trip_and_noise():
    vector = np.arange(5, dtype=np.float32)
    value = pack_embedding(ID, vector)
    assert unpack_embedding(ID, value, 5).tolist() == vector.tolist()
    for bad in (value[:-4], value[:-1], b"", value[:-1] + b"\x07"):
        with pytest.raises(RecordCorrupt):
            unpack_embedding(ID, bad)
    with pytest.raises(RecordCorrupt, match="5 numbers"):
        unpack_embedding(ID, value, 6)


def test_embeddings_are_checked_and_normalised():
    rows = check_embeddings([[3.0, 4.0], [0.0, 0.0]], 2)
    assert np.allclose(rows, [[0.6, 0.8], [0, 0]]) and rows.dtype == np.float32
    with pytest.raises(ValueError, match="row 1"):
        check_embeddings([[1.0], [float("inf")]], 2)
    with pytest.raises(ValueError, match="one row per reference"):
        check_embeddings([[1.0]], 2)


def test_head_is_64_bytes():
    assert HEAD_BYTES == 64 and Layout.of(IDENTITY).record_bytes == 64 + 3 * 2 * 2 * 4 * 16 * 2 + 2 * 3 * 2 * 4
