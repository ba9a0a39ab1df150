"""The codec against FAISS, and coded banks."""

import warnings

import faiss
import numpy as np
import pytest
import torch
from bank_fake import IDENTITY, HashEmbedder, fill, identity, memory_of

from memory3.bank import Bank, BankError, IdentityMismatch
from memory3.bank.codec import Codec, Spec, train_codec

SMALL = "Residual2x4,PQ4x4"
ROTATED = "OPQ4_16,Residual2x5,PQ2x6"
SPECS = [SMALL, ROTATED]


def sample(count=60):
    return [memory_of([i, i + 1, i + 2, i + 3]) for i in range(count)]


@pytest.fixture(scope="module")
def codecs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {spec: train_codec(spec, sample()) for spec in SPECS}


@pytest.mark.parametrize(
    "text, dim, code_bytes",
    [
        ("OPQ20_80,Residual2x14,PQ8x10", 80, 14), ("OPQ8_64,Residual2x8,PQ8x8", 64, 10),
        ("Residual2x4,PQ4x4", 16, 3), ("Residual2x6,PQ8x5", 64, 7), ("Residual2x9,PQ4x11", 32, 9),
    ],
)  # fmt: skip
def test_code_sizes_are_those_of_faiss(text, dim, code_bytes):
    assert Spec.parse(text, dim).code_bytes == code_bytes == faiss.index_factory(dim, text).sa_code_size()


@pytest.mark.parametrize(
    "text, dim, message",
    [
        ("PQ8x8", 64, "must look like"), ("OPQ8_32,Residual2x8,PQ8x8", 64, "vectors of 32"),
        ("Residual2x8,PQ7x8", 64, "does not fit"), ("Residual2x3,PQ8x8", 64, "4 to 14"),
        ("Residual2x15,PQ8x8", 64, "4 to 14"), ("OPQ7_64,Residual2x8,PQ8x8", 64, "does not fit"),
    ],
)  # fmt: skip
def test_specs_that_are_refused(text, dim, message):
    with pytest.raises(ValueError, match=message):
        Spec.parse(text, dim)


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_equals_faiss(codecs, spec):
    codec = codecs[spec]
    memory = memory_of([901, 902, 903, 904])
    codes = codec.encode(memory.kv)
    size = memory.kv.shape[3] * codec.code_bytes
    assert codes.dtype == torch.uint8 and not codes[..., size:].any()
    layout_fp32 = Bank_layout(codec)
    decoded = codec.decode(codes, layout_fp32)
    for plane in range(2):
        index = codec._index(plane)
        flat = memory.kv[:, plane].float().reshape(-1, 16).numpy()
        own = codes[:, plane, :, :size].reshape(-1, codec.code_bytes).numpy()
        assert (own == index.sa_encode(flat)).all()
        want = index.sa_decode(np.ascontiguousarray(own))
        got = decoded[:, plane].reshape(-1, 16).numpy()
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        assert np.square(got - flat).mean() < 0.75 * np.square(flat).mean(), "the code holds nothing of the vectors"


def Bank_layout(codec):
    from memory3.bank.format import Layout

    return Layout.of(identity(dtype="float32"), codec.code_bytes)


def test_keys_and_values_have_books_of_their_own(codecs):
    codec = codecs[SMALL]
    assert not torch.equal(codec.keys.coarse, codec.values.coarse)


def test_training_is_repeatable_and_named_by_its_books(codecs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_codec(SMALL, sample()).name == codecs[SMALL].name
        assert train_codec(SMALL, sample(50)).name != codecs[SMALL].name


def test_too_few_vectors():
    with pytest.raises(ValueError, match="at least 16 training keys.*gave 6"):
        train_codec(SMALL, [memory_of([1])])
    with pytest.raises(ValueError, match="got none"):
        train_codec(SMALL, [])
    with pytest.warns(UserWarning, match="better books"):
        train_codec(SMALL, sample(3))


@pytest.mark.parametrize("spec", SPECS)
def test_books_round_trip(codecs, spec):
    raw = codecs[spec].to_bytes()
    assert Codec.from_bytes(raw).name == codecs[spec].name
    for bad in (raw[:-4], raw + b"\0" * 4, b"", raw[:20], b"XXXX" + raw[4:]):
        with pytest.raises(BankError, match="damaged"):
            Codec.from_bytes(bad)


@pytest.mark.parametrize("spec", SPECS)
def test_coded_bank(tmp_path, codecs, spec):
    codec = codecs[spec]
    with Bank.create(tmp_path / "b", IDENTITY, codec=codec) as bank:
        ids = fill(bank, 12)
        (short,) = bank.add([memory_of([4, 5], "s")], HashEmbedder().encode(["s"]))
        assert bank.identity.codec == codec.name and bank.layout.kv_bytes < 3 * 2 * 2 * 4 * 16 * 2 / 2
    with Bank.open(tmp_path / "b", identity(codec=codec.name)) as bank:
        ids.append(short)
        assert bank.verify() == []
        for i, memory in zip(ids, bank.get(ids), strict=True):
            source = memory_of(memory.token_ids, ident=IDENTITY)
            want = codec.decode(codec.encode(source.kv), bank.layout)
            want[..., source.n_valid :, :] = 0
            assert torch.equal(memory.kv, want) and i == bank.record_id(memory.token_ids)
        kv = torch.full((20, *bank.layout.kv_shape), 7.0, dtype=torch.bfloat16)
        codes = torch.full((20, *bank.layout.codes_shape), 7, dtype=torch.uint8)
        length, other = torch.zeros(20, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
        slots = [3, 0, 19, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
        bank.read_into(ids, kv, length, slots)
        bank.read_codes_into(ids, codes, other, slots)
        assert torch.equal(length, other) and int(length[14]) == 2 and bool((kv[1] == 7).all())
        for slot, memory in zip(slots, bank.get(ids), strict=True):
            n = memory.n_valid
            assert torch.equal(kv[slot][..., :n, :], memory.kv[..., :n, :])
            assert torch.equal(codec.decode(codes[slot], bank.layout)[..., :n, :], memory.kv[..., :n, :])
        wide = torch.zeros(20, *bank.layout.kv_shape)
        bank.read_into(ids[:1], wide, length, [0])
        assert torch.equal(wide[0].bfloat16(), bank.get(ids[:1])[0].kv)


def test_the_books_are_part_of_the_identity(tmp_path, codecs):
    Bank.create(tmp_path / "b", IDENTITY, codec=codecs[SMALL]).close()
    with pytest.raises(IdentityMismatch, match="codec"):
        Bank.open(tmp_path / "b", identity(codec=codecs[ROTATED].name))
    with Bank.open(tmp_path / "b", write=True) as bank:
        swapped = codecs[ROTATED].to_bytes()
        bank.env.write(lambda txn: txn.put(b"codec", swapped, db=bank.env.db("header")))
    with pytest.raises(IdentityMismatch, match="hash of the books"):
        Bank.open(tmp_path / "b")


def test_cold_start_and_salvage_of_a_coded_bank(tmp_path, codecs):
    from bank_fake import encode

    with Bank.create(tmp_path / "b", IDENTITY, codec=codecs[SMALL]) as bank:
        ids = fill(bank, 50)
        cold = bank.add_cold(["c"], [[8, 9]], HashEmbedder().encode(["c"]))
        with Bank.open(bank.path) as reader:
            reader.ensure(cold, encode)
            codes, length = torch.zeros(2, *bank.layout.codes_shape, dtype=torch.uint8), torch.zeros(2).int()
            reader.read_codes_into(cold, codes, length, [1])
        bank.ensure(cold, encode)
        assert torch.equal(codes[1], codecs[SMALL].encode(memory_of([8, 9]).kv))
        want = bank.digest()
    assert Bank.salvage(tmp_path / "b", tmp_path / "c").records == 51
    with Bank.open(tmp_path / "c") as bank:
        assert bank.digest() == want and len(bank.get(ids)) == 50
