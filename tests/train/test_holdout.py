"""Splits by title and decontamination."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.data import Entry
from memory3.train.holdout import Decontaminator, in_split, split_of, title_key


def test_splits_are_fixed_and_have_the_stated_sizes():
    counts = {"train": 0, "dev": 0, "test": 0}
    for i in range(20000):
        counts[split_of(f"title {i}")] += 1
    assert abs(counts["dev"] / 20000 - 0.1) < 0.01 and abs(counts["test"] / 20000 - 0.1) < 0.01
    # A published split must never move: these were drawn when it was fixed.
    assert [split_of(t) for t in ("Paris", "Dog", "Niger", "Cuba")] == FIXED


FIXED = ["train", "test", "dev", "test"]


def test_a_country_of_the_factbook_is_in_one_split():
    fields = [Entry(f"Aruba - {f}", "text", "factbook") for f in ("Capital", "Airports", "Coastline")]
    assert {title_key(e) for e in fields} == {"Aruba"}
    assert title_key(Entry("Aruba - a history", "text", "wiki")) == "Aruba - a history"
    assert list(in_split(fields, split_of("Aruba"))) == fields
    with pytest.raises(ValueError, match="split"):
        in_split(fields, "training")


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(words, words, st.integers(1, 4))
def test_shares_is_common_runs_of_words(one, other, gram):
    def runs(seq):
        return {tuple(seq[i : i + gram]) for i in range(len(seq) - gram + 1)}

    assert Decontaminator([" ".join(one)], gram).shares(" ".join(other)) == bool(runs(one) & runs(other))


def test_case_and_punctuation_do_not_hide_a_copy():
    passage = "The quick brown fox jumps over the lazy dog, and then it rests: a while, in the sun."
    guard = Decontaminator([passage])
    assert guard.shares("THE QUICK BROWN FOX jumps over the lazy dog and then -- it rests a while!")
    assert not guard.shares("The quick brown fox jumps over the lazy dog and then")
    kept = Entry("other", "Nothing of the kind is said in this text, which has more than thirteen words in it.")
    assert list(guard.clean([Entry("copy", passage), kept])) == [kept]
    assert len(Decontaminator(["a short answer"])) == 0
