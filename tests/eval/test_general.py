"""Loss of windows of general text, per reader."""

from __future__ import annotations

import pytest
import torch
from engine.common import make_model, words

from memory3.eval.arms import Reader
from memory3.eval.general import LENGTH, cut_windows, general_losses


def test_windows_are_scored_by_every_reader(tmp_path):
    models = [make_model(seed=s) for s in (0, 1)]
    readers = {name: Reader(m.net, m.net) for name, m in zip(("original", "adapted"), models, strict=True)}
    tokenizer = models[0].tokenizer
    (tmp_path / "book.txt").write_text(words(1500, 1))
    (tmp_path / "talks").mkdir()
    for i in range(2):
        (tmp_path / "talks" / f"{i}.txt").write_text(words(500, i))
    ticks: list[int] = []
    texts = cut_windows([tmp_path / "book.txt", tmp_path / "talks"], tokenizer, 3)
    rows = general_losses(readers, tokenizer, texts, tick=ticks.append)
    assert sum(ticks) == len(rows) == 2 * 2 * 3
    assert {(r["arm"], r["set"]) for r in rows} == {
        (f"{a}: no memory", s) for a in readers for s in ("book.txt", "talks")
    }
    one = next(r for r in rows if r["arm"] == "adapted: no memory" and r["set"] == "book.txt")
    ids = list(texts["book.txt"][int(one["id"].rpartition("-")[2])])
    book = tokenizer.encode((tmp_path / "book.txt").read_text())
    assert any(ids == book[at : at + LENGTH] for at in range(0, len(book), LENGTH))
    logits = models[1].net(torch.tensor([1, *ids]), torch.tensor([0, LENGTH + 1], dtype=torch.int32))[:-1]
    assert one["loss"] == pytest.approx(-float(torch.log_softmax(logits, -1)[range(LENGTH), ids].sum()), rel=1e-4)
    (tmp_path / "short.txt").write_text("river")
    with pytest.raises(ValueError, match="short.txt"):
        cut_windows([tmp_path / "short.txt"], tokenizer, 3)
