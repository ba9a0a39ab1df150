"""Warm start in one process: skips, cold, codec, limits. Crashes are in test_bank_crash.py."""

import pytest
import torch
from bank_fake import IDENTITY, FakeModel, HashEmbedder, identity, memory_of, texts

from memory3.bank import Bank, BankError, IdentityMismatch
from memory3.bank.build import build_bank
from memory3.data import Entry

ENTRIES = [Entry(f"t{i}", text, "made up") for i, text in enumerate(texts(40))]


def build(path, entries=ENTRIES, model=None, **options):
    return build_bank(path, entries, model or FakeModel(), HashEmbedder(), progress=False, **options)


def test_build_and_again(tmp_path):
    model = FakeModel()
    report = build(tmp_path / "b", ENTRIES + ENTRIES[:5], model)
    assert (report.references, report.written, report.present, model.written) == (40, 40, 0, 40)
    with Bank.open(tmp_path / "b", IDENTITY) as bank:
        want = bank.digest()
        assert bank.stats()["index"]["up_to_date"]
        record_id = bank.search(HashEmbedder().encode(texts(1, 7)), 1)[0][0][0]
        reference = bank.reference(record_id)
        assert (reference.text, reference.title, reference.source) == (texts(1, 7)[0], "t7", "made up")
        assert torch.equal(bank.get([record_id])[0].kv, memory_of(reference.token_ids).kv)
    report = build(tmp_path / "b", model=model)
    assert (report.written, report.present, model.written) == (0, 40, 40)
    with Bank.open(tmp_path / "b") as bank:
        assert bank.digest() == want


def test_limit_then_the_rest(tmp_path):
    assert build(tmp_path / "b", limit=13).references == 13
    report = build(tmp_path / "b")
    assert (report.references, report.written, report.present) == (40, 27, 13)
    build(tmp_path / "c")
    with Bank.open(tmp_path / "b") as grown, Bank.open(tmp_path / "c") as once:
        assert grown.digest() == once.digest()


def test_long_entries_become_several_references(tmp_path):
    build(tmp_path / "b", [Entry("Title", "One two three four five. " * 4 + "Another sentence ends it.")])
    with Bank.open(tmp_path / "b") as bank:
        kept = sorted(bank.text(i) for i in bank.ids())
        assert (
            len(kept) == 2 and kept[1].startswith("Title: ") and all(len(bank.token_ids(i)) <= 16 for i in bank.ids())
        )


def test_cold_then_warm(tmp_path):
    model = FakeModel()
    assert build(tmp_path / "b", model=model, cold=True).written == 40 and model.written == 0
    with Bank.open(tmp_path / "b") as bank:
        assert bank.stats()["cold"] == 40 and len(bank.search(HashEmbedder().encode(["topic 3"]), 5)[0][0]) == 5
    assert build(tmp_path / "b", model=model).written == 40
    with Bank.open(tmp_path / "b") as bank:
        assert bank.stats()["cold"] == 0


def test_another_model_or_embedder_is_refused(tmp_path):
    build(tmp_path / "b")
    with pytest.raises(IdentityMismatch, match="model_hash"):
        build(tmp_path / "b", model=FakeModel(identity(model_hash="z")))

    class Other(HashEmbedder):
        name = "other"

    with pytest.raises(IdentityMismatch, match="embedder"):
        build_bank(tmp_path / "b", ENTRIES, FakeModel(), Other(), progress=False)
    with pytest.raises(IdentityMismatch, match="codec"):
        build(tmp_path / "b", codec="Residual2x4,PQ4x4")


@pytest.mark.filterwarnings("ignore:codec .* is trained on")
def test_a_coded_build_can_be_continued(tmp_path):
    spec = "Residual2x4,PQ4x4"
    build(tmp_path / "b", limit=30, codec=spec)
    assert build(tmp_path / "b", codec=spec).present == 30
    with Bank.open(tmp_path / "b", IDENTITY) as bank:
        assert bank.identity.codec.startswith(spec + ":") and bank.stats()["records"] == 40


def test_progress_and_empty_corpus(tmp_path, capsys):
    seen = []
    build_bank(tmp_path / "b", ENTRIES, FakeModel(), HashEmbedder(), batch=15, progress=lambda *a: seen.append(a))
    assert seen == [(15, 40), (30, 40), (40, 40)]
    build_bank(tmp_path / "c", ENTRIES, FakeModel(), HashEmbedder())
    assert "40/40" in capsys.readouterr().err
    with pytest.raises(BankError, match="no text"):
        build(tmp_path / "d", [])
    with pytest.raises(ValueError, match="batch"):
        build(tmp_path / "e", batch=0)
