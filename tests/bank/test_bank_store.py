"""Create, add, read, search, delete, compact: one process."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from bank_fake import IDENTITY, HashEmbedder, encode, fill, identity, memory_of, texts

from memory3.bank import (
    Bank,
    BankError,
    BankExists,
    BankFull,
    BankLocked,
    BankNotFound,
    BankReadOnly,
    ColdRecord,
    IdentityMismatch,
    RecordCorrupt,
    UnknownRecord,
)

EMBED = HashEmbedder().encode


@pytest.fixture
def bank(tmp_path):
    with Bank.create(tmp_path / "bank", IDENTITY) as made:
        yield made


def arena(bank, slots=8, fill_value=float("nan"), pad=0):
    """kv with an optional gap between slots, and lengths."""
    size = int(np.prod(bank.layout.kv_shape))
    flat = torch.full((slots, size + pad), fill_value, dtype=bank.layout.dtype)
    return flat[:, :size].unflatten(1, bank.layout.kv_shape), torch.full((slots,), -9, dtype=torch.int32)


def test_add_get_text_and_ids(bank):
    ids = fill(bank, 30)
    assert len(bank) == 30 and sorted(ids) == list(bank.ids()) and ids[0] in bank
    for i, (record_id, memory) in enumerate(zip(ids, bank.get(ids), strict=True)):
        want = memory_of(memory.token_ids)
        assert record_id == IDENTITY.record_id(memory.token_ids)
        assert torch.equal(memory.kv, want.kv) and torch.equal(memory.pos, want.pos)
        assert memory.text == bank.text(record_id) == texts(1, i)[0] and memory.n_valid == want.n_valid
        assert bank.token_ids(record_id) == memory.token_ids


def test_adding_twice_changes_nothing(bank):
    ids = fill(bank, 10)
    before, generation = bank.digest(), bank.generation
    assert fill(bank, 10) == ids
    assert fill(bank, 3) + fill(bank, 3) == ids[:3] * 2
    assert (len(bank), bank.digest(), bank.generation) == (10, before, generation)


def test_titles_and_sources(bank):
    (record_id,) = bank.add([memory_of([1], "t")], EMBED(["t"]), titles=["T"], sources=["file"])
    reference = bank.reference(record_id)
    assert (reference.title, reference.source, reference.text) == ("T", "file", "t")
    with pytest.raises(ValueError, match="titles"):
        bank.add([memory_of([2], "t")], EMBED(["t"]), titles=[])


@pytest.mark.parametrize("pad", [0, 64])
def test_read_into_writes_just_its_slots(bank, pad):
    ids = fill(bank, 6)
    kv, length = arena(bank, pad=pad)
    moved = bank.read_into(ids[:3], kv, length, torch.tensor([6, 0, 3]))
    assert moved == 3 * bank.layout.record_bytes
    for slot, record_id in ((6, ids[0]), (0, ids[1]), (3, ids[2])):
        want = bank.get([record_id])[0]
        assert torch.equal(kv[slot], want.kv) and int(length[slot]) == want.n_valid
    for slot in (1, 2, 4, 5, 7):
        assert bool(kv[slot].isnan().all()) and int(length[slot]) == -9


def test_read_into_a_strange_arena(bank):
    """Slots that are not contiguous in themselves are filled too."""
    ids = fill(bank, 2)
    shape = bank.layout.kv_shape
    kv = torch.zeros(3, *shape[:-1], 2 * shape[-1], dtype=torch.bfloat16)[..., : shape[-1]]
    bank.read_into(ids, kv, torch.zeros(3, dtype=torch.int32), [2, 1])
    assert torch.equal(kv[2], bank.get(ids[:1])[0].kv) and torch.equal(kv[1], bank.get(ids[1:])[0].kv)


def test_read_into_checks_its_arguments(bank):
    ids = fill(bank, 2)
    kv, length = arena(bank)
    for bad, message in (
        ({"slots": [0]}, "slots must have one"),
        ({"slots": [0, 8]}, r"slots\[1\]"),
        ({"slots": [-1, 0]}, r"slots\[0\]"),
        ({"kv": kv[:, :2]}, "kv must be"),
        ({"kv": kv.float()}, "kv must be"),
        ({"length": length.long()}, "length must be"),
        ({"bias": torch.zeros(1)}, "bias must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.read_into(ids, **({"kv": kv, "length": length, "slots": [0, 1]} | bad))
    with pytest.raises(UnknownRecord, match=(b"z" * 16).hex()):
        bank.read_into([b"z" * 16], kv, length, [0])
    with pytest.raises(ValueError, match="dense"):
        bank.read_codes_into(ids, kv, length, [0, 1])


def test_bias_plane(bank):
    plain, biased = fill(bank, 1)[0], fill(bank, 1, start=1, bias=True)[0]
    assert bank.has_bias
    kv, length = arena(bank)
    with pytest.raises(ValueError, match="bias"):
        bank.read_into([biased], kv, length, [0])
    bias = torch.full((8, *bank.layout.pos_shape), 7.0)
    bank.read_into([plain, biased], kv, length, [2, 4], bias)
    assert bool((bias[2] == 0).all()) and torch.equal(bias[4], bank.get([biased])[0].bias)
    assert bool((bias[[0, 1, 3]] == 7).all())


def test_has_bias_is_false_without_one(bank):
    fill(bank, 2)
    assert not bank.has_bias


def test_values_are_copies(bank):
    """What get and read_into give stays right after the bank has changed and is closed."""
    ids = fill(bank, 5)
    kv, length = arena(bank)
    bank.read_into(ids, kv, length, range(5))
    memory, vector = bank.get(ids[:1])[0], bank.embedding(ids[0])
    want, want_vector = kv.clone(), vector.copy()
    bank.delete(ids)
    fill(bank, 50, start=100)
    bank.compact()
    bank.close()
    assert torch.equal(kv[:5], want[:5]) and torch.equal(memory.kv, want[0]) and (vector == want_vector).all()


def test_search_finds_the_text_itself(bank):
    ids, words = fill(bank, 40), texts(40)
    found, scores = bank.search(EMBED(words), 3)
    assert [line[0] for line in found] == ids and all(len(line) == 3 for line in found)
    assert all(abs(line[0] - 1) < 1e-5 and line == sorted(line, reverse=True) for line in scores)


def test_search_equals_brute_force(bank):
    ids = fill(bank, 60)
    queries = EMBED(["topic 3", "place 31 entry", "nothing known"])
    every = np.stack([bank.embedding(i) for i in ids])
    found, scores = bank.search(queries * 5, 7)  # length does not matter: cosine
    for query, line, cosines in zip(queries, found, scores, strict=True):
        best = np.argsort(-(every @ query), kind="stable")[:7]
        assert np.allclose(cosines, (every @ query)[best], atol=1e-5) and set(line) == {ids[i] for i in best}


def test_search_of_an_empty_or_small_bank(bank):
    assert bank.search(EMBED(["a"]), 5) == ([[]], [[]])
    ids = fill(bank, 2)
    assert set(bank.search(EMBED(["a"]), 5)[0][0]) == set(ids)
    assert bank.search(EMBED(["a"])[:0], 5) == ([], []) and bank.search(EMBED(["a"]), 0) == ([[]], [[]])
    with pytest.raises(ValueError, match=r"queries must be \[Q, 32\]"):
        bank.search(np.ones((1, 31), np.float32), 1)


def test_delete(bank):
    ids = fill(bank, 20)
    bank.search(EMBED(["a"]), 1)
    assert bank.delete([*ids[:5], b"n" * 16, ids[0]]) == 5
    assert len(bank) == 15 and not bank.has(ids[0])
    assert not set(bank.search(EMBED(texts(20)), 20)[0][0]) & set(ids[:5])
    with pytest.raises(UnknownRecord):
        bank.get(ids[:1])
    fill(bank, 5)
    assert bank.search(EMBED(texts(1)), 1)[0] == [[ids[0]]] and len(bank) == 20


def test_compact_gives_space_back_and_readers_follow(bank):
    ids = fill(bank, 400)
    with Bank.open(bank.path) as reader:
        bank.delete(ids[20:])
        want = bank.digest()
        size = bank.stats()["file_bytes"]
        assert bank.compact() > size // 2 and bank.stats()["file_bytes"] < size // 2
        assert bank.digest() == reader.digest() == want
        assert set(reader.search(EMBED(texts(5)), 1)[0][0]) <= set(ids[:20])
        fill(bank, 5, start=900)
        assert len(reader) == 25
        assert not list(bank.path.glob(".compact*"))
    assert bank.verify() == []


def test_cold_start(bank):
    ids = bank.add_cold(["first", "second"], [[1, 2], [3]], EMBED(["first", "second"]))
    assert bank.cold(ids) == ids and bank.search(EMBED(["second"]), 1)[0] == [[ids[1]]]
    assert bank.stats()["cold"] == 2 and bank.inspect(ids[0]).cold
    kv, length = arena(bank)
    with pytest.raises(ColdRecord) as error:
        bank.read_into(ids, kv, length, [0, 1])
    assert error.value.ids == ids
    with pytest.raises(ColdRecord):
        bank.get(ids)
    calls = []

    def write(tokens):
        calls.append(tokens)
        return encode(tokens)

    assert bank.ensure([ids[1], ids[1], ids[0]], write) == 2 and calls == [[[3], [1, 2]]]
    assert bank.ensure(ids, write) == 0 and len(calls) == 1 and bank.stats()["cold"] == 0
    assert torch.equal(bank.get(ids)[0].kv, memory_of([1, 2]).kv) and bank.text(ids[0]) == "first"
    bank.read_into(ids, kv, length, [0, 1])
    assert torch.equal(kv[1], memory_of([3]).kv) and int(length[1]) == 1
    with pytest.raises(UnknownRecord):
        bank.ensure([b"q" * 16], write)


def test_cold_start_of_a_read_only_bank_stays_in_ram(bank):
    ids = bank.add_cold(["first"], [[1, 2]], EMBED(["first"]))
    with Bank.open(bank.path) as reader:
        assert reader.ensure(ids, encode) == 1 and reader.ensure(ids, encode) == 0
        kv, length = arena(bank)
        reader.read_into(ids, kv, length, [3])
        assert torch.equal(kv[3], memory_of([1, 2]).kv) and int(length[3]) == 2
        assert reader.cold(ids) == ids and bank.stats()["records"] == 0


def test_a_read_only_bank_keeps_what_the_last_call_asked_for(bank):
    """More cold references than are held in RAM: an old one that is asked for again must not go to make room."""
    names = [f"cold {i}" for i in range(80)]
    ids = bank.add_cold(names, [[i + 1] for i in range(80)], EMBED(names))
    with Bank.open(bank.path) as reader:
        for i in range(64):
            reader.ensure([ids[i]], encode)
        asked = [ids[0], ids[70], ids[71]]
        assert reader.ensure(asked, encode) == 2
        assert [m.token_ids for m in reader.get(asked)] == [[1], [71], [72]]
        assert reader.ensure(ids, encode) > 0 and len(reader.get(ids)) == 80


def test_a_cold_reference_can_be_added_warm(bank):
    ids = bank.add_cold(["w"], [[1, 2]], EMBED(["w"]))
    assert bank.add([memory_of([1, 2], "w")], EMBED(["w"])) == ids
    assert not bank.is_cold(ids[0]) and len(bank) == 1


def test_inspect_and_stats(bank):
    (record_id,) = bank.add([memory_of([1, 2, 3], "abc")], EMBED(["abc"]))
    info = bank.inspect(record_id)
    assert info.n_valid == 3 and info.bytes == bank.layout.record_bytes and not info.cold
    assert info.kept(2, 1) == [0, 1, 2] and info.reference.text == "abc"
    stats = bank.stats()
    json.dumps(stats)
    assert (stats["references"], stats["records"], stats["cold"], stats["embedding_dim"]) == (1, 1, 0, 32)
    assert stats["identity"]["tokens"] == 4 and not stats["index"]["up_to_date"]
    bank.build_index()
    assert bank.stats()["index"] == {"built_as": "flat", "generation": 1, "count": 1, "up_to_date": True}


def test_the_caller_must_give_tokens_and_the_right_shape(bank):
    good = memory_of([1, 2])
    with pytest.raises(ValueError, match=r"memories\[0\] has no token_ids"):
        bank.add([replace(good, token_ids=[])], EMBED(["a"]))
    with pytest.raises(ValueError, match=r"memories\[1\].*float32"):
        bank.add([good, replace(memory_of([3]), kv=good.kv.float())], EMBED(["a", "b"]))
    with pytest.raises(ValueError, match=r"token_ids\[0\] is empty"):
        bank.add_cold(["a"], [[]], EMBED(["a"]))
    assert len(bank) == 0
    fill(bank, 1)
    with pytest.raises(ValueError, match="32"):
        bank.add_cold(["a"], [[9]], np.ones((1, 3), np.float32))


# ---- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_hash", "x" * 64), ("tokenizer_hash", "y"), ("prefix_ids", (1, 3)), ("context_bos_ids", (2,)),
        ("layers", (0, 2, 4)), ("head_map", ((0, 1), (0, 1), (1, 0))), ("tokens", 5), ("span", 64), ("head_dim", 8),
        ("record_heads", 1), ("rope_base", 5e5), ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("dtype", "float16"), ("rule", "exp"), ("codec", "OPQ8_64,Residual2x8,PQ8x8:0"), ("embedder", "other"),
        ("format_version", 2),
    ],
)  # fmt: skip
def test_any_mismatch_is_refused_by_name(tmp_path, field, value):
    Bank.create(tmp_path / "b", IDENTITY).close()
    with pytest.raises(IdentityMismatch) as error:
        Bank.open(tmp_path / "b", identity(**{field: value}))
    assert [entry[0] for entry in error.value.fields] == [field]
    assert field in str(error.value) and repr(value) in str(error.value)
    Bank.open(tmp_path / "b", IDENTITY).close()


def test_several_mismatches_are_all_named(tmp_path):
    Bank.create(tmp_path / "b", IDENTITY).close()
    with pytest.raises(IdentityMismatch) as error:
        Bank.open(tmp_path / "b", identity(tokens=9, span=64), write=True)
    assert [entry[0] for entry in error.value.fields] == ["tokens", "span"]
    Bank.open(tmp_path / "b", write=True).close()  # the refused writer has let go of the lock


def test_an_identity_without_embedder_fits_any(tmp_path):
    Bank.create(tmp_path / "b", IDENTITY).close()
    Bank.open(tmp_path / "b", identity(embedder="")).close()


def test_a_bank_of_a_later_format_is_refused(tmp_path):
    with pytest.raises(IdentityMismatch, match="format_version: the bank has 7"):
        Bank.create(tmp_path / "b", identity(format_version=7))


def test_paths_that_are_no_bank(tmp_path):
    with pytest.raises(BankNotFound, match="no such folder"):
        Bank.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BankNotFound, match="data.mdb"):
        Bank.open(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(BankExists):
        Bank.create(tmp_path / "full", IDENTITY)
    import lmdb

    lmdb.open(str(tmp_path / "other"), max_dbs=1).close()
    with pytest.raises(BankNotFound, match="not a memory3 bank"):
        Bank.open(tmp_path / "other")


def test_closed_and_read_only(tmp_path):
    bank = Bank.create(tmp_path / "b", IDENTITY)
    bank.close()
    bank.close()
    with pytest.raises(BankError, match="closed"):
        len(bank)
    with Bank.open(tmp_path / "b") as reader:
        for change in (
            lambda: fill(reader, 1), lambda: reader.delete([b"a" * 16]), reader.compact,
            lambda: reader.add_cold(["a"], [[1]], EMBED(["a"])),
        ):  # fmt: skip
            with pytest.raises(BankReadOnly, match="write=True"):
                change()


def test_second_writer_in_the_same_process(tmp_path):
    import os

    with Bank.create(tmp_path / "b", IDENTITY):
        with pytest.raises(BankLocked, match=f"process {os.getpid()} "):
            Bank.open(tmp_path / "b", write=True)
    Bank.open(tmp_path / "b", write=True).close()


def test_reader_first_then_writer_in_one_process(tmp_path):
    Bank.create(tmp_path / "b", IDENTITY).close()
    with Bank.open(tmp_path / "b") as reader, Bank.open(tmp_path / "b", write=True) as writer:
        fill(writer, 3)
        assert len(reader) == 3
        writer.close()
        assert len(reader) == 3


def test_a_replaced_bank_is_noticed(tmp_path):
    old = Bank.create(tmp_path / "b", IDENTITY)
    fill(old, 3)
    shutil.rmtree(tmp_path / "b")
    with Bank.create(tmp_path / "b", identity(rule="exp")) as new:
        assert len(new) == 0
        with pytest.raises(BankError, match="replaced"):
            len(old)
    old.close()


def test_abandoned_creation_is_cleaned(tmp_path):
    (tmp_path / ".b.new-999999999").mkdir()
    Bank.create(tmp_path / "b", IDENTITY).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


# ---- damage, growth, threads ---------------------------------------------------------------------------------------


def damage(bank, record_id, database, change):
    def work(txn):
        value = bytearray(txn.get(record_id, db=bank.env.db(database)))
        change(value)
        txn.put(record_id, bytes(value), db=bank.env.db(database))

    bank.env.write(work)


def test_a_flipped_bit_is_found_on_every_way_out(bank):
    ids = fill(bank, 3)

    def flip(value):
        value[len(value) // 2] ^= 1

    damage(bank, ids[1], "records", flip)
    kv, length = arena(bank)
    for read in (
        lambda: bank.get(ids),
        lambda: bank.read_into(ids, kv, length, [0, 1, 2]),
        lambda: bank.inspect(ids[1]),
    ):
        with pytest.raises(RecordCorrupt, match=ids[1].hex()):
            read()
    damage(bank, ids[2], "references", flip)
    with pytest.raises(RecordCorrupt, match=ids[2].hex()):
        bank.text(ids[2])
    damage(bank, ids[0], "embeddings", flip)
    with pytest.raises(RecordCorrupt, match=ids[0].hex()):
        bank.search(EMBED(["a"]), 1)
    assert sorted(i for i, _ in bank.verify()) == sorted(ids)


def test_the_map_grows(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY, map_bytes=1 << 20) as bank, Bank.open(bank.path) as reader:
        start = bank.stats()["map_bytes"]
        for part in range(4):
            fill(bank, 300, start=300 * part)
        assert bank.stats()["map_bytes"] > start and len(reader) == 1200 and reader.verify() == []


def test_max_bytes_is_a_clear_error(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY, map_bytes=1 << 20, max_bytes=3 << 20) as bank:
        fill(bank, 200)
        want = bank.digest()
        with pytest.raises(BankFull, match="max_bytes"):
            fill(bank, 3000, start=1000)
        assert bank.digest() == want or len(bank) > 200
        assert bank.verify() == []
        bank.delete(list(bank.ids())[:100])


def test_threads_read_while_one_writes(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY, map_bytes=1 << 20) as bank:
        ids = fill(bank, 20)
        want = [memory_of(m.token_ids).kv for m in bank.get(ids)]
        stop, errors, reads = threading.Event(), [], [0]

        def look():
            kv, length = arena(bank, 20)
            try:
                while not stop.is_set():
                    bank.read_into(ids, kv, length, range(20))
                    assert all(torch.equal(kv[i], want[i]) for i in range(20))
                    assert bank.search(EMBED(texts(1)), 1)[0][0] == [ids[0]]
                    reads[0] += 1
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for part in range(6):  # the map grows several times
            fill(bank, 150, start=1000 + 150 * part)
        bank.compact()
        fill(bank, 50, start=5000)
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors and reads[0] >= 3 and bank.verify() == [] and len(bank) == 970
