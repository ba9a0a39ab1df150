"""The controlled study asks what it says it asks."""

from __future__ import annotations

import json

from memory3.train import people as study
from memory3.train.people import HELD, TRAIN, People, Statements, questions

PEOPLE = People(0)


def test_the_answer_stands_in_the_reference_alone():
    for sample in questions(PEOPLE, range(TRAIN, TRAIN + HELD), "memory"):
        (piece,) = sample.pieces
        *_, field, first, last, value = sample.ids
        assert sample.first == len(sample.ids) - 1 and len(piece.reads) == study.REFS
        read = [PEOPLE.tokens(r) for r in piece.reads]
        (gold,) = [r for r in read if r[:2] == [first, last]]
        place = gold.index(field + study.FIELDS)  # the word that tells it, not the one that asks
        assert gold[place + 1] == value and field not in gold and value not in sample.ids[:-1]


def test_nobody_evaluated_is_trained_on():
    names = {tuple(n) for n in PEOPLE.names}
    assert len(names) == TRAIN + HELD
    held = {tuple(n) for n in PEOPLE.names[TRAIN:]}
    for read in ("none", "text", "memory"):
        source = Statements(PEOPLE, read, 0, 8, 0)
        for step in range(20):
            for sample in source.samples(step):
                pairs = set(zip(sample.ids, sample.ids[1:], strict=False))
                assert not pairs & held
                for piece in sample.pieces:
                    assert all(int.from_bytes(r, "big") < TRAIN for r in piece.reads)


def test_memory_begins_after_its_warmup():
    source = Statements(PEOPLE, "memory", 5, 4, 0)
    assert not any(s.pieces for s in source.samples(4)) and all(s.pieces for s in source.samples(5))
    plain, text = (Statements(PEOPLE, r, 0, 4, 0).samples(5) for r in ("none", "text"))
    for a, b, c in zip(source.samples(5), plain, text, strict=True):
        assert a.ids == b.ids and c.ids[-len(a.ids) :] == a.ids
        assert len(c.ids) - c.first == len(a.ids) - a.first == study.TOLD * 5  # the same is predicted


def test_a_short_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ARMS", {"closed book": ("none", 0.0), "memory after 1/2": ("memory", 0.5)})
    found = study.study(tmp_path, steps=4, batch=2, progress=False)
    assert [r["step"] for r in found["memory after 1/2"]] == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "people.json").read_text())["arms"] == found
    assert (tmp_path / "people.png").stat().st_size > 1000
    assert study.study(tmp_path, steps=4, batch=2, progress=False) == found  # nothing left to do
