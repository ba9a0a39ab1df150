"""`memory3 train` from end to end on a made-up corpus: every stage, resumed, loaded, adapted."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from memory3 import load_model
from memory3.cli.app import app
from memory3.cli.train import evaluation_texts, with_changes
from memory3.train.checkpoint import checkpoints
from memory3.train.lora import read_adapter
from memory3.train.metrics import read_metrics
from memory3.train.presets import run_config

from .test_data import ARTICLES, Letters

SMALL = [
    "shape.vocab_size=400", "shape.dim=32", "shape.n_layers=2", "shape.n_heads=2", "shape.n_kv_heads=1",
    "shape.head_dim=16", "shape.ffn_dim=48", "memory.layers=[0]", "length=128", "batch=4", "micro_batch=2", "steps=4",
    "eval_every=2", "eval_items=4", "warmup_steps=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_embedder(monkeypatch):
    monkeypatch.setattr("memory3.train.prepare.as_embedder", lambda given: given or Letters())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "towns.jsonl"
    file.write_text("".join(json.dumps({"title": a.title, "text": a.text}) + "\n" for a in ARTICLES))
    return file


def command(*arguments, changes=()) -> dict:
    options = [x for change in changes for x in ("--set", change)]
    done = CliRunner().invoke(app, ["train", "--json", *map(str, arguments), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_from_nothing_to_answers(corpus, tmp_path):
    """Warmup, continual training that goes on from it, tuning, an adapter on a frozen bank: all by the command."""
    first = command("--config", "tiny", "--out", tmp_path / "a", "--text", corpus, changes=SMALL)
    assert first["step"] == 4 and set(first["evaluation"]) == {"none"}
    assert (tmp_path / "a" / "loss.png").is_file()
    model = load_model(first["result"], torch.float32)
    assert model.memory.layers == (0,) and model.tokenizer.vocab_size <= 400

    rest = [c for c in SMALL if not c.startswith("shape")]
    second = command(
        "--config", "tiny", "--stage", "continual", "--from", tmp_path / "a", "--out", tmp_path / "b", "--text", corpus,
        changes=rest,
    )  # fmt: skip
    assert set(second["evaluation"]) == {"none", "memory"}

    third = command(
        "--config", "tiny", "--stage", "sft", "--from", tmp_path / "b", "--out", tmp_path / "c", "--reference", corpus,
        changes=[*rest, "lora.rank=2", "write=frozen", 'eval_reads=["none", "memory", "text"]'],
    )  # fmt: skip
    assert set(third["evaluation"]) == {"none", "memory", "text"}
    state, about = read_adapter(tmp_path / "c" / "adapter")
    assert about["step"] == 4 and about["write"] == "frozen" and len(state) == 2 * 4 * 2

    # The bank that it wrote serves another run; more steps are a run resumed.
    again = command(
        "--config", "tiny", "--stage", "sft", "--from", tmp_path / "b", "--out", tmp_path / "d", "--bank",
        tmp_path / "c" / "bank", changes=[*rest, "write=frozen"],
    )  # fmt: skip
    more = command(
        "--config", "tiny", "--stage", "sft", "--from", tmp_path / "b", "--out", tmp_path / "d", "--bank",
        tmp_path / "c" / "bank", changes=[*rest, "write=frozen", "steps=6"],
    )  # fmt: skip
    assert again["step"] == 4 and more["step"] == 6
    assert [line["step"] for line in read_metrics(tmp_path / "d") if "loss" in line] == []  # every 10th is logged
    assert checkpoints(tmp_path / "d")[-1].name.endswith("06")


def test_changes_on_the_command_line(tmp_path):
    base = run_config("smollm2-135m", "sft")
    changed = with_changes(
        base, ["lr=1e-4", "lora.rank=4", "memory.tokens=16", "write=live", 'lora.targets=["qkv"]'], None
    )
    assert changed.lr == 1e-4 and changed.lora.rank == 4 and changed.lora.targets == ("qkv",)
    assert changed.memory == {"layers": tuple(range(30)), "tokens": 16, "rule": "causal"} and changed.write == "live"
    assert with_changes(base, ["lora=none"], tmp_path).model == str(tmp_path)
    with pytest.raises(ValueError, match="name=value"):
        with_changes(base, ["lr"], None)
    with pytest.raises(ValueError, match="speed"):
        with_changes(base, ["speed=2"], None)


def test_evaluation_texts_are_found_in_any_shape(tmp_path):
    import gzip

    (tmp_path / "a.txt").write_text("plain text")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"doc": {"question": "who?", "answers": ["me", {"alias": "I"}], "n": 3}}) + "\n")
    assert list(evaluation_texts([tmp_path])) == ["plain text", "who?", "me", "I"]


def test_show_computes_and_trains_nothing(tmp_path):
    done = CliRunner().invoke(app, ["train", "--config", "paper-2.4b", "--stage", "continual", "--show"])
    assert done.exit_code == 0 and "GiB" in done.output
    with pytest.raises(ValueError, match="--out"):
        CliRunner().invoke(app, ["train"], catch_exceptions=False)


def test_frozen_memories_are_those_of_the_base(corpus, tmp_path):
    """Records written in the middle of training, with the adapter already trained, are what the base alone writes."""
    from memory3.cli.write import entries
    from memory3.train.prepare import prepare

    base = tmp_path / "base"
    command("--config", "tiny", "--out", base, "--text", corpus, changes=SMALL)
    rest = [c for c in SMALL if not c.startswith("shape")]
    settings = with_changes(run_config("tiny", "sft"), [*rest, "write=frozen", "lora.rank=2"], base)
    run = prepare(settings, tmp_path / "run", references=entries([str(corpus)]))
    with torch.no_grad():
        for name, parameter in run.model.net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    record = next(iter(run.bank.ids()))
    tokens = run.bank.token_ids(record)
    assert run.bank.is_cold(record)
    kv, length = run.objective._load([record])
    run.close()
    model = load_model(base / "model")
    expected = model.write_ids([tokens])[0]
    assert length.tolist() == [expected.n_valid]
    torch.testing.assert_close(kv[0], expected.kv)
