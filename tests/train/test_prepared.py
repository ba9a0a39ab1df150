"""Prepared here, trained there: a run from one file, without texts, embedder or bank."""

from __future__ import annotations

import pytest
import torch
from model.common import TINY_MEMORY

from memory3.bank.codec import Codec, Tables
from memory3.cli.train import with_changes
from memory3.train.ahead import in_background
from memory3.train.lora import read_adapter
from memory3.train.prepare import from_prepared
from memory3.train.prepared import Prepared
from memory3.train.presets import run_config

from .test_data import Letters
from .test_run import SMALL, command, corpus, small_embedder  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):  # noqa: F811
    """A base model and data prepared for tuning it."""
    place = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory3.train.prepare.as_embedder", lambda given: given or Letters())
        patch.setattr("memory3.train.prepare.PLAIN_LENGTH", 32)  # the corpus is small
        command("--config", "tiny", "--out", place / "base", "--text", corpus, changes=SMALL)
        told = command(
            "--config", "tiny", "--stage", "sft", "--from", place / "base", "--reference", corpus, "--text", corpus,
            "--rounds", 2, "--prepare", place / "data.npz", changes=REST,
        )  # fmt: skip
    return place / "base", place / "data.npz", told


REST = [c for c in SMALL if not c.startswith("shape")]


def test_the_file_holds_the_run(made):
    base, file, told = made
    data = Prepared.load(file)
    assert told["references"] == len(data.references) and told["questions"]["train"] == len(data.items["train"]) > 20
    for item in data.items["train"]:
        assert item.gold in data.train and set(item.found) <= data.train and item.found
    assert all(0 <= n < len(data.references) for i in data.items["dev"] for n in (i.gold, *i.found))
    assert {i.gold for i in data.items["dev"]} - data.train
    data.save(file.with_name("again.npz"))
    again = Prepared.load(file.with_name("again.npz"))
    assert again.items == data.items and again.references == data.references and again.train == data.train
    with pytest.raises(ValueError, match="another tokenizer"):
        data.check(type("Other", (), {"hash": "x"})(), TINY_MEMORY)


def test_it_trains_an_adapter(made, tmp_path, monkeypatch):
    base, file, _ = made

    def refuse(*args, **options):
        raise AssertionError("no embedder and no bank here")

    monkeypatch.setattr("memory3.train.prepare.as_embedder", refuse)
    monkeypatch.setattr("memory3.train.prepare._bank", refuse)
    tables = Tables(torch.randn(2, 16, 8), torch.randn(4, 16, 4) / 4, None)
    codec = tmp_path / "books.bin"
    codec.write_bytes(Codec("Residual2x4,PQ4x4", tables, tables).to_bytes())
    changes = [
        *REST, "lora.rank=2", "write=frozen", "plain=0.25", "plain_loss=base", "drop_found=0.2", "quantised=0.5",
        f"codec={codec}", 'eval_reads=["none", "memory", "text", "quantised", "random", "plain"]',
    ]  # fmt: skip
    found = command(
        "--config", "tiny", "--stage", "sft", "--from", base, "--out", tmp_path / "run", "--prepared", file,
        "--device", "cpu", changes=changes,
    )  # fmt: skip
    assert set(found["evaluation"]) == {"none", "memory", "text", "quantised", "random", "plain"}
    assert found["step"] == 4 and read_adapter(tmp_path / "run" / "adapter")[1]["write"] == "frozen"


def test_live_writing_from_the_file(made):
    base, file, _ = made
    settings = with_changes(run_config("tiny", "sft"), [*REST, "write=live"], base)
    run = from_prepared(settings, Prepared.load(file))
    samples = run.source.samples(0)
    assert samples == run.source.samples(0) and any(s.pieces for s in samples)
    assert set(run.evaluate(run.model.net)) == {"none", "memory"}


def test_other_stages_and_shares_are_refused(made):
    base, file, _ = made
    data = Prepared.load(file)
    with pytest.raises(ValueError, match="sft"):
        from_prepared(with_changes(run_config("tiny", "warmup"), REST, base), data)
    with pytest.raises(ValueError, match="codec"):
        with_changes(run_config("tiny", "sft"), ["quantised=0.5"], None)
    with pytest.raises(ValueError, match="drop_found"):
        with_changes(run_config("tiny", "sft"), ["drop_found=1.5"], None)


def test_a_thread_runs_ahead_and_hands_over_errors():
    def items():
        yield from range(20)
        raise KeyError("late")

    with in_background(items()) as made, pytest.raises(KeyError, match="late"):
        for n, item in enumerate(made):
            assert n == item
    assert n == 19
    with in_background(iter(range(1000))) as made:
        assert next(made) == 0  # and the rest is let go
