"""Finding values in the data file without LMDB, and asking for them ahead of time."""

from __future__ import annotations

import os

import lmdb
import pytest

from memory3.bank.ahead import announce
from memory3.bank.lmdbfile import places


def value(i: int) -> bytes:
    return bytes([i % 251]) * (5000 + i)


@pytest.fixture
def folder(tmp_path):
    """900 large values under 16-byte keys (a tree of three levels), 50 small ones, another database beside them."""
    with lmdb.open(str(tmp_path), map_size=1 << 26, max_dbs=4) as env:
        records, others = env.open_db(b"records"), env.open_db(b"others")
        for start in range(0, 900, 300):  # several commits: both meta pages are in use
            with env.begin(write=True) as txn:
                for i in range(start, start + 300):
                    txn.put(key(i), value(i), db=records)
        with env.begin(write=True) as txn:
            for i in range(50):
                txn.put(b"small %10d" % i, b"x" * i, db=records)
                txn.put(key(i), b"other" * 2000, db=others)
    return tmp_path


def key(i: int) -> bytes:
    return (i * 2654435761 % 2**64).to_bytes(8, "big") + i.to_bytes(8, "big")


def test_every_value_is_found_where_it_lies(folder):
    with open(folder / "data.mdb", "rb") as file:
        found = places(file, folder, "records", [key(i) for i in range(900)])
        assert len(found) == 900
        for i, (offset, size) in enumerate(found):
            assert os.pread(file.fileno(), size, offset)[16:] == value(i)


def test_what_is_not_there_is_left_out(folder):
    with open(folder / "data.mdb", "rb") as file:
        keys = [b"", b"\0" * 15, key(3), b"\xff" * 16, key(10**6), b"small          7"]
        assert len(places(file, folder, "records", keys)) == 1  # small values lie in their leaf
        assert places(file, folder, "nothing", [key(3)]) == []
        assert len(places(file, folder, "others", [key(3), key(60)])) == 1


def test_the_newest_commit_counts(folder):
    with lmdb.open(str(folder), map_size=1 << 26, max_dbs=4) as env, env.begin(write=True) as txn:
        records = env.open_db(b"records", txn=txn)
        txn.put(key(5), b"new" * 3000, db=records)
        txn.delete(key(6), db=records)
    with open(folder / "data.mdb", "rb") as file:
        ((offset, size),) = places(file, folder, "records", [key(5), key(6)])
        assert os.pread(file.fileno(), size, offset)[16:] == b"new" * 3000


def test_a_hint_never_fails(folder, tmp_path):
    announce(folder / "data.mdb", "records", [key(1), b"missing"])
    announce(tmp_path / "no-such-file", "records", [key(1)])
    size = (folder / "data.mdb").stat().st_size
    for keep in (size // 2, 9000, 100, 0):
        os.truncate(folder / "data.mdb", keep)
        announce(folder / "data.mdb", "records", [key(i) for i in range(900)])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="posix_fadvise is not there")
def test_only_what_was_asked_for_is_read(folder):
    """After eviction, announcing one value brings in its pages and little more."""
    path = folder / "data.mdb"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    asked = []
    real = os.posix_fadvise
    os.posix_fadvise = lambda fd, offset, size, advice: (
        asked.append((offset, size, advice)) or real(fd, offset, size, advice)
    )
    try:
        announce(path, "records", [key(7), key(8)])
    finally:
        os.posix_fadvise = real
    assert asked.pop(0)[2] == os.POSIX_FADV_RANDOM
    assert [advice for _, _, advice in asked] == [os.POSIX_FADV_WILLNEED] * 2
    assert sum(size for _, size, _ in asked) == len(value(7)) + len(value(8)) + 32
