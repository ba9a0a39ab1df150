"""Export and import: the same bank comes back, and a cut or altered file is refused."""

import io
import json
import tarfile

import pytest
from bank_fake import IDENTITY, HashEmbedder, fill, identity, memory_of

from memory3.bank import Bank, BankError, IdentityMismatch
from memory3.bank import transfer as transfer_module
from memory3.bank.codec import train_codec
from memory3.bank.transfer import ExportDamaged


@pytest.fixture
def bank(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_module, "PART_REFERENCES", 16)
    with Bank.create(tmp_path / "b", IDENTITY) as made:
        fill(made, 30)
        fill(made, 10, start=30, bias=True)
        made.add_cold(["cold", "colder"], [[1], [2]], HashEmbedder().encode(["cold", "colder"]), titles=["a", "b"])
        yield made


def test_round_trip(bank, tmp_path):
    assert bank.export(tmp_path / "x.tar") == 42
    with Bank.import_(tmp_path / "x.tar", tmp_path / "c", IDENTITY) as copy:
        assert copy.digest() == bank.digest() and copy.has_bias and copy.verify() == []
        query = HashEmbedder().encode(["topic 5"])
        assert copy.search(query, 5) == bank.search(query, 5)
    with Bank.import_(tmp_path / "x.tar", tmp_path / "c") as again:
        assert again.digest() == bank.digest()


@pytest.mark.filterwarnings("ignore:codec .* is trained on")
def test_round_trip_of_a_coded_bank(tmp_path):
    codec = train_codec("Residual2x4,PQ4x4", [memory_of([i, 1, 2, 3]) for i in range(20)])
    with Bank.create(tmp_path / "b", IDENTITY, codec=codec) as bank:
        fill(bank, 20)
        bank.export(tmp_path / "x.tar")
        with Bank.import_(tmp_path / "x.tar", tmp_path / "c") as copy:
            assert copy.digest() == bank.digest() and copy.codec.name == codec.name


def test_empty_bank(tmp_path):
    with Bank.create(tmp_path / "b", IDENTITY) as bank:
        assert bank.export(tmp_path / "x.tar") == 0
        with Bank.import_(tmp_path / "x.tar", tmp_path / "c") as copy:
            assert len(copy) == 0 and copy.digest() == bank.digest()


def test_it_holds_nothing_but_json_and_tensors(bank, tmp_path):
    bank.export(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = [m.name for m in tar]
        assert names[0] == "bank.json" and names[-1] == "end.json"
        assert all(n.endswith((".json", ".jsonl", ".safetensors")) for n in names) and len(names) == 2 + 2 * 3
        line = json.loads(tar.extractfile("00000000.jsonl").readline())
        assert set(line) == {"id", "text", "token_ids", "title", "source", "record", "embedding"}
    assert not list(tmp_path.glob(".x.tar*"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.98])
def test_a_cut_file_is_refused_and_a_whole_one_completes_it(bank, tmp_path, share):
    bank.export(tmp_path / "x.tar")
    raw = (tmp_path / "x.tar").read_bytes()
    whole = len(raw.rstrip(b"\0"))
    (tmp_path / "y.tar").write_bytes(raw[: int(share * whole)])
    with pytest.raises(ExportDamaged):
        Bank.import_(tmp_path / "y.tar", tmp_path / "c")
    with Bank.import_(tmp_path / "x.tar", tmp_path / "c") as copy:
        assert copy.digest() == bank.digest()


def rewrite(source, target, change):
    """Copy a tar, members passed through change(name, bytes) -> bytes or None to leave it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "change",
    {
        "other tokens": lambda n, d: (
            d.replace(b'"token_ids": [', b'"token_ids": [7, ', 1) if n.endswith("jsonl") else d
        ),
        "no end": lambda n, d: None if n == "end.json" else d,
        "a part less": lambda n, d: None if n.startswith("00000001") else d,
        "no tensors": lambda n, d: None if n.endswith("safetensors") else d,
        "broken tensors": lambda n, d: d[:-40] if n.endswith("safetensors") else d,
        "broken lines": lambda n, d: d[:-40] if n.endswith("jsonl") else d,
        "no header": lambda n, d: None if n == "bank.json" else d,
        "stranger": lambda n, d: d.replace(b"memory3-bank-export", b"something-else-here"),
    }.items(),
    ids=lambda item: item[0],
)
def test_altered_files_are_refused(bank, tmp_path, change):
    bank.export(tmp_path / "x.tar")
    rewrite(tmp_path / "x.tar", tmp_path / "y.tar", change[1])
    with pytest.raises(ExportDamaged):
        Bank.import_(tmp_path / "y.tar", tmp_path / "c")


def test_links_and_foreign_members_are_refused(bank, tmp_path):
    bank.export(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        link = tarfile.TarInfo("bank.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ExportDamaged, match="does not belong"):
        Bank.import_(tmp_path / "y.tar", tmp_path / "c")


def test_mismatches(bank, tmp_path):
    bank.export(tmp_path / "x.tar")
    with pytest.raises(IdentityMismatch, match="rule"):
        Bank.import_(tmp_path / "x.tar", tmp_path / "c", identity(rule="exp"))
    assert not (tmp_path / "c").exists()
    Bank.create(tmp_path / "d", identity(rule="exp")).close()
    with pytest.raises(IdentityMismatch, match="rule"):
        Bank.import_(tmp_path / "x.tar", tmp_path / "d")
    with pytest.raises(BankError, match="cannot read"):
        Bank.import_(tmp_path / "none.tar", tmp_path / "e")
    with pytest.raises(BankError, match="cannot export"):
        bank.export(tmp_path / "no" / "x.tar")
