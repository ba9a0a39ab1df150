"""The index is a cache: whatever happens to it, searches equal a fresh build."""

import numpy as np
import pytest
from bank_fake import IDENTITY, HashEmbedder, fill, texts

from memory3.bank import Bank
from memory3.bank.index import ADDED, INDEX_FILE, VectorIndex

EMBED = HashEmbedder().encode


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def keys(start, count):
    return [i.to_bytes(16, "big") for i in range(start, start + count)]


@pytest.fixture
def path(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY) as bank:
        fill(bank, 50)
        bank.search(EMBED(["a"]), 1)
    return tmp_path / "b"


def best(bank):
    return bank.search(EMBED(texts(60)), 5)


def test_closing_writes_the_cache_and_opening_uses_it(path, monkeypatch):
    assert (path / INDEX_FILE).is_file()
    monkeypatch.setattr(VectorIndex, "build", lambda *a: pytest.fail("rebuilt although the cache is good"))
    with Bank.open(path) as bank:
        assert bank.stats()["index"]["up_to_date"] and len(best(bank)[0][0]) == 5


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "flipped", "noise", "other bank"])
def test_a_bad_cache_is_rebuilt_silently(path, tmp_path, how):
    file = path / INDEX_FILE
    with Bank.open(path) as bank:
        want = best(bank)
    raw = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "other bank":
        with Bank.create(tmp_path / "c", IDENTITY) as other:
            fill(other, 50, start=500)
            other.build_index()
        file.write_bytes((tmp_path / "c" / INDEX_FILE).read_bytes())
    else:
        if how == "flipped":
            raw[-9] ^= 4
        file.write_bytes({"empty": b"", "cut": raw[:-100], "flipped": raw, "noise": b"M3IX" + bytes(range(200))}[how])
    with Bank.open(path) as bank:
        assert best(bank) == want


def test_an_old_cache_catches_up(path, monkeypatch):
    old = (path / INDEX_FILE).read_bytes()
    with Bank.open(path, write=True) as bank:
        ids = list(bank.ids())
        bank.delete(ids[:10])
        fill(bank, 20, start=100)
        bank.build_index()
        want = best(bank)
    (path / INDEX_FILE).write_bytes(old)
    monkeypatch.setattr(VectorIndex, "build", lambda *a: pytest.fail("rebuilt instead of replaying the log"))
    with Bank.open(path) as bank:
        assert best(bank) == want


def test_a_cache_older_than_compaction_is_rebuilt(path):
    old = (path / INDEX_FILE).read_bytes()
    with Bank.open(path, write=True) as bank:
        bank.delete(list(bank.ids())[:30])
        bank.compact()
        want = best(bank)
    (path / INDEX_FILE).write_bytes(old)
    with Bank.open(path) as bank:
        assert best(bank) == want and len(want[0][0]) == 5


def test_another_reader_sees_additions_without_reopening(path):
    with Bank.open(path) as reader, Bank.open(path, write=True) as writer:
        reader.search(EMBED(["a"]), 1)
        (new,) = fill(writer, 1, start=77)
        assert reader.search(EMBED(texts(1, 77)), 1)[0] == [[new]]


def test_deleted_and_added_again_with_another_embedding(path):
    from bank_fake import memory_of

    with Bank.open(path, write=True) as bank:
        (one,) = bank.add([memory_of([1, 2], "one")], EMBED(["one"]))
        assert bank.search(EMBED(["one"]), 1)[1][0][0] > 0.999
        bank.delete([one])
        bank.add([memory_of([1, 2], "one")], EMBED(["two"]))
        assert bank.search(EMBED(["two"]), 1)[0] == [[one]] and bank.search(EMBED(["one"]), 1)[1][0][0] < 0.999


@pytest.mark.parametrize("kind, least", [("flat", 1.0), ("hnsw", 0.95), ("ivf", 0.8)])
def test_kinds_find_what_brute_force_finds(kind, least):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 16))
    rows = unit(centres[rng.integers(0, 40, 3000)] + 0.3 * rng.standard_normal((3000, 16)))
    names = keys(0, 3000)
    index = VectorIndex(16, kind)
    index.build(names[:2600], rows[:2600], "e", 1)
    assert index.built_as == kind
    dead = set(names[100:160])
    assert index.change(names[2600:], rows[2600:], dead, 2) and len(index) == 2940
    queries = unit(rows[:200] + 0.1 * rng.standard_normal((200, 16)))
    found, scores = index.search(queries, 10)
    alive = [i for i, name in enumerate(names) if name not in dead]
    truth = np.argsort(-(queries @ rows[alive].T), axis=1)[:, :10]
    hits = sum(len(set(f) & {names[alive[j]] for j in t}) for f, t in zip(found, truth, strict=True))
    assert hits / 2000 >= least
    assert all(not set(f) & dead for f in found)
    for line, cosines in zip(found, scores, strict=True):
        assert len(line) == len(cosines) and cosines == sorted(cosines, reverse=True)


def test_many_deletions_ask_for_a_rebuild():
    rows = unit(np.random.default_rng(0).standard_normal((400, 8)))
    index = VectorIndex(8, "hnsw")
    index.build(keys(0, 400), rows, "e", 1)
    assert not index.change([], rows[:0], keys(0, 150), 2)


def test_a_small_ivf_is_searched_exactly_and_grows_up(tmp_path):
    rows = unit(np.random.default_rng(0).standard_normal((3000, 8)))
    index = VectorIndex(8, "ivf")
    index.build(keys(0, 100), rows[:100], "e", 1)
    assert index.built_as == "flat"
    assert not index.change(keys(100, 2900), rows[100:], [], 2)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_save_and_load(tmp_path, kind):
    rows = unit(np.random.default_rng(1).standard_normal((200, 8)))
    index = VectorIndex(8, kind)
    index.build(keys(0, 200), rows, "e", 3)
    index.change(keys(200, 1), rows[:1], keys(5, 3), 4)
    assert index.save(tmp_path)
    back = VectorIndex(8, kind)
    assert back.load(tmp_path, "e") and back.generation == 4 and len(back) == 198
    assert back.search(rows[:20], 4) == index.search(rows[:20], 4)
    assert not VectorIndex(8, kind).load(tmp_path, "f") and not VectorIndex(9, kind).load(tmp_path, "e")


def test_unknown_kind():
    with pytest.raises(ValueError, match="index must be one of"):
        VectorIndex(8, "annoy")
    assert ADDED == 1
