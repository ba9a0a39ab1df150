"""Scores, intervals and the share of the gap, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from memory3.eval import report
from memory3.eval.scores import exact_match, f1


def test_answers_are_compared_as_words():
    assert exact_match("The  Eiffel-Tower.", ["eiffeltower", "x"]) == 1.0
    assert exact_match("in 1889", ["1889"]) == 0.0
    assert f1("in the year 1889", ["1889"]) == pytest.approx(2 * 1 / (3 + 1))
    assert f1("", ["1889"]) == 0.0 and f1("a the", ["an"]) == 1.0
    assert f1("red blue blue", ["blue blue green", "red"]) == pytest.approx(2 / 3)


def rows(arm: str, losses, tokens=None, name: str = "s"):
    tokens = tokens or [1] * len(losses)
    return [
        {"arm": arm, "set": name, "id": f"{name}{i}", "loss": float(x), "tokens": t, "gold": i % 2 == 0}
        for i, (x, t) in enumerate(zip(losses, tokens, strict=True))
    ]


def test_the_mean_is_per_token_and_its_interval_covers_it():
    losses, tokens = np.random.default_rng(0).gamma(2, 1, 400), [1, 3] * 200
    (row,) = report.table(rows("a", losses, tokens))
    assert row["nll"] == pytest.approx(losses.sum() / 800) and row["n"] == 400 and row["gold"] == 0.5
    low, high = row["nll_interval"]
    error = np.sqrt(400) * np.std(losses - row["nll"] * np.array(tokens)) / 800  # of a ratio, first order
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15) and low < row["nll"] < high
    assert row["f1"] is None


def test_pairs_are_compared_on_the_questions_that_both_answered():
    a, b = rows("a", [1.0, 2.0, 3.0]), rows("b", [2.0, 4.0, 6.0, 100.0])
    (row,) = report.difference(a + b, "a", "b")
    assert row["n"] == 3 and row["value"] == pytest.approx(-0.5)
    assert row["interval"] == pytest.approx([-0.5, -0.5])  # each pair differs by the same factor: nothing is uncertain
    assert report.difference(a, "a", "b") == []


def test_share_of_the_gap():
    every = rows("closed", [4.0, 8.0]) + rows("text", [2.0, 4.0]) + rows("memory", [3.0, 6.0])
    (row,) = report.gap_closed(every, "memory", "closed", "text")
    assert row["value"] == pytest.approx(0.5) and row["interval"] == pytest.approx([0.5, 0.5])


def test_tables_and_pictures(tmp_path):
    every = rows("a", [1.0, 2.0]) + rows("b", [2.0]) + rows("a", [3.0], name="t")
    every[0] |= {"said": "x", "em": 1.0, "f1": 0.5}
    table = report.table(every)
    text = report.markdown(table)
    assert "| | s (n=2) | t (n=1) |" in text and "1.500" in text and "F1 0.50" in text
    assert "2.000 ±0.00 (n=1)" in text.splitlines()[3]
    report.draw(table, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
