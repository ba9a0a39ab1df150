"""The controlled study asks what it says it asks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from memory3.train import people as study
from memory3.train.invented import (
    ASKS,
    CLOSED,
    FIELDS,
    NAME,
    STATED,
    TELLS,
    VALUE,
    Invented,
    Statements,
    questions,
    tokens,
)

PEOPLE = Invented(syllables=16, group=32, fillers=1)
HELD, KNOWN, SHUT = (range(g * 32, (g + 1) * 32) for g in range(3))
SMALL = replace(study.SIZES["cpu"], syllables=16, group=32, dim=16, heads=2, kv_heads=2, head_dim=8, layers=2,
                memory_layers=1, batch=4, steps=4, asked=8, evals=4)  # fmt: skip


def names(ids) -> set[tuple[int, ...]]:
    """First and last words that stand side by side."""
    return {(a, b) for a, b in zip(ids, ids[1:], strict=False) if NAME <= a < NAME + 16 <= b}


def group(whom: range) -> set[tuple[int, ...]]:
    return set().union(*(names(s.ids) for s in questions(PEOPLE, whom, "none")))


def test_the_answer_stands_in_the_reference_alone():
    for sample in questions(PEOPLE, HELD, "memory"):
        (piece,) = sample.pieces
        *_, first, last, asks, value = sample.ids
        assert sample.first == len(sample.ids) - 1 and len(piece.reads) == PEOPLE.refs
        read = [tokens(r) for r in piece.reads]
        gold = next(r for r in read if r[:2] == [first, last])
        place = gold.index(asks - ASKS + TELLS)  # the word that tells it, not the one that asks
        assert gold[place + 1] == value and asks not in gold and value not in sample.ids[:-1]


def test_the_groups_share_no_name():
    groups = [group(whom) for whom in (HELD, KNOWN, SHUT)]
    assert [len(g) for g in groups] == [32] * 3 and len(set().union(*groups)) == 96


@pytest.mark.parametrize("read", ["none", "text", "memory"])
def test_who_is_in_the_training_text(read):
    held, known, shut = (group(whom) for whom in (HELD, KNOWN, SHUT))
    source = Statements(PEOPLE, read, read, 0, 16, 0)
    met = set()
    for step in range(20):
        samples = source.samples(step)
        assert samples == source.samples(step) and len(samples) == 16
        for i, sample in enumerate(samples):
            told = [t for piece in sample.pieces for r in piece.reads for t in tokens(r)]
            here = names(sample.ids) | names(told)
            assert not here & held
            alone = i < CLOSED * 16
            assert (here <= shut) if alone else not here & shut
            assert bool(told) == (read == "memory" and not alone)
            assert len(sample.ids) - sample.first == 4 * STATED
            met |= here
    assert known <= met and shut <= met and len(met) > 96 + 32


def test_facts_of_strangers_change_and_those_of_known_people_do_not():
    facts: dict[tuple, set] = {}
    source = Statements(PEOPLE, "none", "none", 0, 64, 0)
    for step in range(20):
        for sample in source.samples(step):
            for at in range(1, len(sample.ids), 4):
                first, last, asks, value = sample.ids[at : at + 4]
                assert VALUE + (asks - ASKS) * 40 <= value < VALUE + (asks - ASKS + 1) * 40 and asks < ASKS + FIELDS
                facts.setdefault((asks, first, last), set()).add(value)
    fixed = group(KNOWN) | group(SHUT)
    assert all((len(values) == 1) for key, values in facts.items() if key[1:] in fixed)
    assert any((len(values) > 2) for key, values in facts.items() if key[1:] not in fixed)


def test_memory_begins_after_its_warmup():
    source = Statements(PEOPLE, "none", "memory", 5, 8, 0)
    before, after = ([bool(p.reads) for s in source.samples(step) for p in s.pieces] for step in (4, 5))
    assert before == [False, False] and after == [False, False, *[True] * 6]  # two sequences never read
    plain, text = (Statements(PEOPLE, r, r, 0, 8, 0).samples(5) for r in ("none", "text"))
    for a, b, c in zip(source.samples(5), plain, text, strict=True):
        assert a.ids == b.ids == c.ids[-len(a.ids) :]  # the same statements


def test_a_short_study(tmp_path):
    for arm in ("closed book", "memory after text", "memory after text, frozen", "text"):
        assert study.run(arm, tmp_path, SMALL, torch.device("cpu"), progress=False)
        assert study.run(arm, tmp_path, SMALL, torch.device("cpu"), progress=False)  # nothing left to do
    found = study.collect(tmp_path)
    assert [r["step"] for r in found["memory after text"][0]] == [0, 1, 2, 3, 4]
    assert set(json.loads((tmp_path / "people.json").read_text())) == set(found)
    assert (tmp_path / "people.png").stat().st_size > 1000


def test_other_sizes():
    assert SMALL.but(["lr=1e-2", "steps=7"]) == replace(SMALL, lr=1e-2, steps=7)
    with pytest.raises(ValueError, match="--set: expected NAME=VALUE"):
        SMALL.but(["rate=1"])
