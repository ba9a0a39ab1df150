"""Crashes with real processes: kill -9, cut files, full disks, second writers, readers beside a writer."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import crash_child
import pytest
from bank_fake import IDENTITY, HashEmbedder, fill, memory_of, texts

from memory3.bank import Bank, BankError, BankFull, BankLocked, BankTruncated
from memory3.bank.lmdbfile import check_whole

# Children are forked from a clean server process that has imported everything once.
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        SERVER.set_forkserver_preload(["crash_child"])
        multiprocessing.forkserver.ensure_running()


class Child:
    """A process of its own that runs crash_child.act; it has said READY when this returns."""

    def __init__(self, *arguments):
        self.messages, sender = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=crash_child.main, args=(sender, *arguments), daemon=True)
        self.process.start()
        self.pid = self.process.pid
        sender.close()
        assert self.messages.recv() == "READY"

    def finish(self):
        """(exit code, last message or None)."""
        said = None
        try:
            while True:
                said = self.messages.recv()
        except EOFError:
            pass
        self.process.join(60)
        return self.process.exitcode, said

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it was done already
            pass
        return self.finish()


def test_kill_9_while_building_loses_nothing_and_resumes_to_the_same_bank(tmp_path):
    count, dice = 240, random.Random(20)
    assert Child("build", tmp_path / "whole", count, 0).finish() == (0, (count, count, 0))
    with Bank.open(tmp_path / "whole") as bank:
        want = bank.digest()
    path, kept, kills = tmp_path / "killed", 0, 0
    for _ in range(10):
        child = Child("build", path, count, 0.05)
        time.sleep(dice.uniform(0.01, 0.35))
        code, said = child.kill()
        kills += code == -signal.SIGKILL and said is None
        if not (path / "data.mdb").exists():
            continue
        with Bank.open(path) as bank:  # opens at once, and whole
            assert bank.verify() == []
            assert len(bank) >= kept, "a committed reference is lost"
            kept = len(bank)
            assert kept % 8 == 0, "half a batch was committed"
    assert kills >= 4 and kept > 0
    assert Child("build", path, count, 0).finish() == (0, (count, count - kept, kept))
    with Bank.open(path, IDENTITY) as bank:
        assert bank.digest() == want
        found, _ = bank.search(HashEmbedder().encode(texts(count)), 1)
        assert [bank.text(line[0]) for line in found] == texts(count)


@pytest.fixture
def bank_path(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY, map_bytes=1 << 20) as bank:
        for part in range(8):
            fill(bank, 50, start=50 * part)
        bank.build_index()
    return tmp_path / "b"


CUTS = {"half": lambda n: n // 2, "one page": lambda n: n - 4096, "100 bytes": lambda n: 100, "empty": lambda n: 0,
        "meta pages only": lambda n: 8192, "five bytes": lambda n: n - 5}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_file_is_refused_before_it_is_mapped(bank_path, cut, monkeypatch):
    data = bank_path / "data.mdb"
    size = data.stat().st_size
    os.truncate(data, CUTS[cut](size))
    import lmdb

    monkeypatch.setattr(lmdb, "open", lambda *a, **k: pytest.fail("the damaged file was mapped"))
    for write in (False, True):
        with pytest.raises(BankTruncated, match=r"data\.mdb is damaged.*salvage"):
            Bank.open(bank_path, write=write)


@pytest.mark.parametrize("cut", ["half", "one page"])
def test_salvage_of_a_cut_file(bank_path, tmp_path, cut):
    data = bank_path / "data.mdb"
    size = data.stat().st_size
    os.truncate(data, CUTS[cut](size))
    before = data.read_bytes()
    report = Bank.salvage(bank_path, tmp_path / "new", embed=HashEmbedder().encode)
    assert data.read_bytes() == before and report.damaged
    # A record and its text fill about the same pages in every batch: half the file holds close to half of them.
    assert report.records >= (150 if cut == "half" else 395), report
    with Bank.open(tmp_path / "new", IDENTITY) as bank:
        assert bank.verify() == [] and bank.stats()["records"] == report.records
        checked = 0
        for record_id in bank.ids():
            if bank.text(record_id):
                memory_ids = bank.token_ids(record_id)
                assert bank.record_id(memory_ids) == record_id
                if not bank.is_cold(record_id):
                    assert (bank.get([record_id])[0].kv == memory_of(memory_ids).kv).all()
                    checked += 1
                found, scores = bank.search(HashEmbedder().encode([bank.text(record_id)]), 1)
                assert found[0] == [record_id] and scores[0][0] > 0.999
        assert checked == report.records - report.without_text > 0


@pytest.mark.parametrize("cut", ["100 bytes", "meta pages only"])
def test_salvage_of_almost_nothing(bank_path, tmp_path, cut):
    os.truncate(bank_path / "data.mdb", CUTS[cut](0))
    with pytest.raises(BankError, match="header.*is lost"):
        Bank.salvage(bank_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert Bank.salvage(bank_path, tmp_path / "new", identity=IDENTITY).records == 0


def test_salvage_of_a_whole_bank_is_a_copy(bank_path, tmp_path):
    report = Bank.salvage(bank_path, tmp_path / "new")
    with Bank.open(bank_path) as old, Bank.open(tmp_path / "new") as new:
        assert new.digest() == old.digest()
    assert (report.records, report.lost_values, report.damaged) == (400, 0, False)


def test_salvage_passes_over_overwritten_pages(bank_path, tmp_path):
    data = bank_path / "data.mdb"
    raw = bytearray(data.read_bytes())
    middle = len(raw) // 2 // 4096 * 4096
    raw[middle : middle + 5 * 4096] = os.urandom(5 * 4096)
    data.write_bytes(raw)
    report = Bank.salvage(bank_path, tmp_path / "new")
    assert 300 <= report.records <= 400 and report.references >= report.records
    with Bank.open(tmp_path / "new") as bank:
        assert bank.verify() == []


def test_salvage_without_a_header(bank_path, tmp_path):
    data = bank_path / "data.mdb"
    raw = data.read_bytes().replace(b'"codec":"dense"', b'"codec":"dense}')
    data.write_bytes(raw)
    with pytest.raises(BankError, match="identity="):
        Bank.salvage(bank_path, tmp_path / "new")
    assert Bank.salvage(bank_path, tmp_path / "new", identity=IDENTITY).records == 400


def test_unused_pages_missing_at_the_end_are_no_damage(bank_path):
    """LMDB may leave pages that it freed in the same transaction unwritten at the end of the file."""
    with Bank.open(bank_path, write=True) as bank:
        bank.delete(list(bank.ids())[10:])
    data = bank_path / "data.mdb"
    whole = data.read_bytes()
    kept = len(whole)
    while kept > 8192:  # cut free pages off, one by one
        os.truncate(data, kept - 4096)
        try:
            check_whole(data)
        except BankTruncated:
            break
        kept -= 4096
    data.write_bytes(whole[:kept])
    with Bank.open(bank_path, write=True) as bank:
        assert len(bank) == 10 and bank.verify() == []
        fill(bank, 100, start=3000)
        assert len(bank) == 110 and bank.verify() == []


def test_a_file_that_is_no_database(bank_path):
    (bank_path / "data.mdb").write_bytes(os.urandom(1 << 16))
    with pytest.raises(BankTruncated, match="does not start with"):
        Bank.open(bank_path)


def test_full_disk_by_file_size_limit(bank_path):
    with Bank.open(bank_path) as bank:
        old, size = list(bank.ids()), bank.stats()["file_bytes"]
    code, said = Child("limited", bank_path, size + (1 << 19)).finish()
    assert code == 3 and "BankFull" in said and "file size limit" in said and "intact" in said, said
    with Bank.open(bank_path, write=True) as bank:
        assert bank.verify() == [] and len(bank) >= 400
        assert set(old) <= set(bank.ids())
        fill(bank, 10, start=77_000)
        assert bank.verify() == []


def test_full_disk_on_a_small_tmpfs(tmp_path):
    """Needs the right to mount; without it the disk is full by max_bytes and by ulimit in the other tests."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        with Bank.create(disk / "b", IDENTITY, map_bytes=1 << 20, max_bytes=2 << 20) as bank:
            with pytest.raises(BankFull):
                fill(bank, 5000)
            assert bank.verify() == []
        return
    try:
        with Bank.create(disk / "b", IDENTITY) as bank:
            ids = fill(bank, 100)
            want = bank.digest()
            for _ in range(2):
                with pytest.raises(BankFull, match="disk is full"):
                    fill(bank, 5000, start=1000)
                assert bank.digest() == want and bank.verify() == []
            with pytest.raises(BankError):
                bank.export(disk / "export.tar")
            assert not (disk / "export.tar").exists()
            bank.delete(ids[:60])
            fill(bank, 30, start=500)  # goes on in the freed pages
            assert len(bank) == 70 and bank.verify() == []
        (disk / "b" / "lock.mdb").unlink()
        with open(disk / "blob", "wb") as file, pytest.raises(OSError):
            file.write(bytes(4 << 20))
            file.flush()
        with pytest.raises(BankFull, match="disk is full"):
            Bank.create(disk / "new", IDENTITY)
        assert sorted(p.name for p in disk.iterdir()) == ["b", "blob"]
        with pytest.raises(BankFull, match="free .* bytes"):  # and not a SIGBUS from the reader table
            Bank.open(disk / "b")
        (disk / "blob").unlink()
        with Bank.open(disk / "b", write=True) as bank:
            bank.delete(list(bank.ids())[:10])
            assert len(bank) == 60 and bank.verify() == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_second_writer_is_refused_and_told_who_has_it(bank_path):
    child = Child("hold", bank_path)
    try:
        with pytest.raises(BankLocked, match=f"process {child.pid} on "):
            Bank.open(bank_path, write=True)
        with Bank.open(bank_path) as reader:
            assert len(reader) == 400
    finally:
        child.kill()
    with Bank.open(bank_path, write=True) as bank:  # a killed holder leaves no lock behind
        fill(bank, 1, start=5000)


def test_readers_beside_a_writer(bank_path):
    """Three reading processes check every record they get while another adds, grows the map and compacts."""
    readers = [Child("read", bank_path, 2.0) for _ in range(3)]
    assert Child("write", bank_path, 10_000, 500).finish() == (0, None)
    for reader in readers:
        code, rounds = reader.finish()
        assert code == 0 and rounds >= 1
    with Bank.open(bank_path) as bank:
        assert len(bank) == 925 and bank.verify() == []


def test_fork_is_refused_with_a_reason(bank_path):
    with Bank.open(bank_path) as bank:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                len(bank)
                os.write(write, b"it worked")
            except BankError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        assert b"does not survive fork" in os.read(read, 1000)
        assert len(bank) == 400
