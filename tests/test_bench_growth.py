"""bench growth: exponents of known curves, made-up banks that grow, and what the command keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from engine.common import MEMORY, make_model
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import growth
from bench.growth import banks, curves
from bench.growth.exponent import exponents
from memory3 import PRESETS, Bank
from memory3.bank import index as bank_index


@given(st.floats(-2, 3), st.floats(0.01, 100))
def test_exponents_of_a_power(power, factor):
    overall, last = exponents([(x, factor * x**power) for x in (1, 10, 50, 400)])
    assert overall == pytest.approx(power, abs=1e-6) and last == pytest.approx(power, abs=1e-6)


def test_exponents_tell_a_bend():
    """Flat, then proportional: the last pair says 1, the whole less."""
    overall, last = exponents([(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (16, 2.0)])
    assert last == pytest.approx(1.0) and 0 < overall < 0.5
    with pytest.raises(ValueError, match="at least two"):
        exponents([(1, 1.0)])
    with pytest.raises(ValueError, match="all positive"):
        exponents([(1, 1.0), (2, 0.0)])


def test_points_stay_within_the_context():
    assert [s["context"] for s in curves.points("context", 4096)] == [256, 512, 1024, 2048, 4096]
    assert [s["context"] for s in curves.points("context", 8000)][-2:] == [4096, 8000], "the longest there is"
    assert all(s["context"] == 1024 and s["memories"] == 5 for s in curves.points("batch"))
    assert [s["memories"] for s in curves.points("memories")] == list(curves.MEMORIES)


def test_op_call_reads_its_shape():
    out, _, mass = curves.decode_call(context=40, batch=3, memories=2)()
    assert out.shape == (3, curves.HEADS, curves.DIM) and mass.shape == (3, curves.HEADS, 2)
    assert 0 < float(mass.sum(-1).min()) and float(mass.sum(-1).max()) < 1, "memories and context both count"


def test_model_values_where_they_fit():
    model = make_model()
    values = curves.model_values(model, 2, context=64, batch=2, memories=3)
    assert values["step ms"] > 0 and values["prompt ms"] > 0
    room = model.config.max_context - MEMORY.span
    assert curves.model_values(model, 2, context=room, batch=1, memories=1) is None


def test_embeddings_repeat_and_differ():
    first, again, other = banks.embeddings(0, 5), banks.embeddings(0, 5), banks.embeddings(5, 5)
    assert np.array_equal(first, again) and not np.allclose(first, other)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)


@pytest.fixture
def small(monkeypatch):
    for name, value in (("QUERIES", 8), ("LOADS", 6), ("BATCH", 16), ("CENTRES", 4)):
        monkeypatch.setattr(banks, name, value)


def test_a_bank_that_grows(tmp_path, small, monkeypatch):
    """Sizes are reached without writing anything twice; above the flat limit approximate indexes show their recall."""
    preset = PRESETS["smollm2-135m"]
    identity = banks.made_up_identity(preset, replace(preset.memory, tokens=banks.KEPT))
    first = banks.measure(tmp_path / "b", identity, 20)
    assert first["written/s"] > 0 and first["flat search ms p50"] <= first["flat search ms p99"]
    assert 0 < first["load ms p50"] <= first["load ms p99"]
    assert "written/s" not in banks.measure(tmp_path / "b", identity, 20)
    monkeypatch.setattr(banks, "FLAT_UP_TO", 30)
    grown = banks.measure(tmp_path / "b", identity, 60)
    with Bank.open(tmp_path / "b") as store:
        assert len(store) == 60
        ids, _ = store.search(banks.embeddings(16, 4)[:1], 1)
        assert np.allclose(store.embedding(ids[0][0]), banks.embeddings(16, 4)[0], atol=1e-6)
        record = store.layout.record_bytes
        queries = banks.embeddings(99, 3)
        assert banks.nearest(store, queries) == store.search(queries, banks.REFS)[0], "brute force agrees with flat"
    assert grown["hnsw recall"] >= 0.9 and grown["ivf recall"] == 1.0, "60 vectors: ivf searches exactly"
    assert record < grown["disk bytes/reference"]
    assert bank_index.FLAT_UP_TO == 100_000


def test_recall():
    assert banks.recall([[b"a", b"b"], [b"c"]], [[b"a", b"x"], [b"c", b"d"]]) == 0.5


def test_command_keeps_what_it_has(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(curves, "AXES", {"context": (64, 128), "batch": (1, 2)})
    out = tmp_path / "g.json"
    line = ["growth", "--part", "ops", "bank", "--runs", "2", "--sizes", "20", "60", "--json", str(out), "--folder",
            str(tmp_path)]  # fmt: skip
    assert command.main(line) == 0
    read = json.loads(out.read_text())
    assert {(r["part"], r["curve"]) for r in read["rows"]} == {
        ("ops", "memory_decode over context"), ("ops", "memory_decode over batch"), ("bank", "references"),
    }  # fmt: skip
    assert any(e["quantity"] == "flat search ms p50" for e in read["exponents"])
    assert "exponents" in capsys.readouterr().out
    monkeypatch.setattr(banks, "measure", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(curves, "decode_call", lambda **_: pytest.fail("measured twice"))
    assert command.main(line) == 0 and json.loads(out.read_text())["rows"] == read["rows"]
    assert growth.slopes(read["rows"]) == read["exponents"]
