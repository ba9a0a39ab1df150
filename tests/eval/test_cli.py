"""memory3 eval from end to end with a tiny model: the document, the picture, the second call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine.common import HashEmbedder
from typer.testing import CliRunner

from memory3 import embed
from memory3.cli.app import app
from memory3.cli.eval import _chosen, _named_folders
from memory3.eval import load, prepared, sources
from memory3.eval.arms import Arm, Reader

from .test_run import MODEL, made_questions, made_references


@pytest.fixture(autouse=True)
def made(monkeypatch):
    reader = Reader(MODEL.net, MODEL.net)
    monkeypatch.setattr(
        load, "load_readers", lambda *a, **k: ({"original": reader, "adapted": reader}, MODEL.tokenizer)
    )
    monkeypatch.setattr(load, "books", lambda *a: [])
    monkeypatch.setattr(load, "about", lambda *a, **k: {"readers": {}})
    monkeypatch.setattr(embed, "Embedder", HashEmbedder)
    monkeypatch.setattr(prepared, "references", made_references)
    monkeypatch.setattr(prepared, "questions", made_questions)


def call(tmp_path, *extra) -> dict:
    options = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json"), "--questions", "6", "--others", "4"]
    found = CliRunner().invoke(app, ["eval", *options, *extra], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads((tmp_path / "r.json").read_text())


ARMS = ["--arm", "no memory", "--arm", "RAG 5", "--arm", "random", "--arm", "removed"]


def test_a_report(tmp_path):
    report = call(tmp_path, "--set", "squad", "--set", "vera", *ARMS)
    rows = report["tables"][""]["rows"]
    assert {(r["set"], r["n"]) for r in rows} == {("squad", 6), ("vera", 4)}
    assert {r["arm"].partition(": ")[2] for r in rows} == {"no memory", "RAG 5", "random memories", "gold removed"}
    lines = (tmp_path / "out" / "results.jsonl").read_text().count("\n")
    assert lines == 8 * 10 and (tmp_path / "r.png").stat().st_size > 1000
    again = call(tmp_path, "--set", "squad", "--set", "vera", *ARMS)
    assert (tmp_path / "out" / "results.jsonl").read_text().count("\n") == lines
    assert again["tables"] == report["tables"]
    pair = report["tables"][""]["adapted, random memories against none"]["rows"]
    assert [r["n"] for r in pair] == [6, 4]


def test_prepared_elsewhere(tmp_path, monkeypatch):
    """--prepare needs no weights, --prepared no texts and no embedder; the answers are those of one call."""

    class Checkpoint:
        config = MODEL.config

        def tokenizer(self):
            return MODEL.tokenizer

    sets = ["--set", "squad", "--set", "vera"]
    report = call(tmp_path, *sets, *ARMS)
    monkeypatch.setattr("memory3.model.load.open_checkpoint", lambda source: (Checkpoint(), MODEL.memory))
    (tmp_path / "book.txt").write_text("river stone winter market " * 200)
    file, other = tmp_path / "asked.npz", tmp_path / "other"
    other.mkdir()
    made = ["eval", "--prepare", str(file), "--out", str(tmp_path / "out"), "--text", str(tmp_path / "book.txt")]
    found = CliRunner().invoke(
        app, [*made, *sets, "--questions", "8", "--others", "4", "--windows", "2"], catch_exceptions=False
    )
    assert found.exit_code == 0 and "4 of vera; references: 40 main, 40 held" in " ".join(found.output.split())
    monkeypatch.setattr(prepared, "references", None)
    monkeypatch.setattr(embed, "Embedder", None)
    again = call(other, "--prepared", str(file), *ARMS)
    assert again["tables"] == report["tables"]
    assert [r["set"] for r in again["general text"]["rows"]] == ["book.txt"] * 2
    late = call(
        tmp_path / "other", "--prepared", str(file), *ARMS, "--out", str(tmp_path / "late"), "--minutes", "1e-9"
    )
    assert late["tables"][""]["rows"] == []


def test_a_cpu_stops_within_the_hour_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("memory3.cli.eval.CPU_MINUTES", 1e-9)
    options = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json"), "--questions", "2", "--set", "squad"]
    found = CliRunner().invoke(app, ["eval", *options, *ARMS], catch_exceptions=False)
    assert found.exit_code == 0 and "16 answers are missing" in found.output
    assert call(tmp_path, "--set", "squad", *ARMS, "--minutes", "0")["tables"][""]["rows"]


def test_names_of_further_adapters():
    assert _named_folders(["a=x/y", "b=z"]) == {"a": Path("x/y"), "b": Path("z")}
    for wrong in (["a"], ["=x"], ["a="], ["adapted=x"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match="NAME=FOLDER"):
            _named_folders(wrong)


def test_an_arm_is_chosen_by_its_name_or_by_part_of_it():
    arms = [Arm(name) for name in ("a: memory", "a: memory, VQ 34 B", "a: RAG 5", "b: memory")]
    for wanted, names in (
        (["a: memory"], ["a: memory"]),
        (["memory"], ["a: memory", "a: memory, VQ 34 B", "b: memory"]),
        (["b: memory", "VQ"], ["a: memory, VQ 34 B", "b: memory"]),
        ([], [a.name for a in arms]),
    ):
        assert [a.name for a in _chosen(arms, wanted)] == names


def test_general_text(tmp_path):
    (tmp_path / "book.txt").write_text("river stone winter market " * 200)
    report = call(
        tmp_path, "--set", "squad", "--arm", "nothing", "--text", str(tmp_path / "book.txt"), "--windows", "2"
    )
    assert [r["n"] for r in report["general text"]["rows"]] == [2, 2]
    assert report["general text"]["against the original"]["adapted"][0]["value"] == 0


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(*args):
        raise sources.DataMissing("needs a thing; run: install it")

    monkeypatch.setattr(prepared, "references", missing)
    with pytest.raises(FileNotFoundError, match="install it"):
        call(tmp_path, "--set", "squad", *ARMS)
