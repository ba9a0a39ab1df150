"""The demo's questions: what they ask stands in the reference, and the score counts what it says it counts."""

import pytest

from memory3.demo.questions import Question, draw, fact_question, is_hit, sentence_question
from memory3.demo.screen import chosen


def test_fact_questions():
    q = fact_question("Fiji - Capital: name: Suva (on Viti Levu); geographic coordinates: 18 08 S", 3)
    assert (q.answer, q.gold, q.prompt) == ("Suva", 3, "What is the capital of Fiji? The capital of Fiji is")
    assert fact_question("Iraq - Coastline: 58 km", 0).answer == "58 km"
    assert fact_question("Belarus - Coastline: 0 km (landlocked)", 0) is None
    assert fact_question("xx - Coastline: 58 km", 0) is None
    assert fact_question("no field here", 0) is None


def test_sentence_questions():
    q = sentence_question("Ufa", "Ufa is the capital and largest city of Bashkortostan, Russia. It lies on a river.", 1)
    assert q.stem == "Ufa is" and q.answer == "the capital and largest city of Bashkortostan, Russia."
    assert sentence_question("Ufa", "Ufa: It was founded in the year of our lord 1574 by order.", 1) is None
    assert sentence_question("Ufa", "It is the capital and largest city of Bashkortostan, Russia.", 1) is None


def test_draw_is_seeded_and_leaves_out_what_has_two_answers():
    facts = [("", f"Land{chr(97 + i)} - Coastline: {i + 1} km", "factbook") for i in range(8)]
    facts += [("", "Landa - Coastline: 99 km", "factbook")]
    wiki = [(f"Thing{i}", f"Thing{i} is a very useful thing that people liked in 200{i}.", "wiki") for i in range(8)]
    drawn = draw(facts + wiki, 8, seed=1)
    assert drawn == draw(facts + wiki, 8, seed=1) != draw(facts + wiki, 8, seed=2)
    assert sorted(q.kind for q in drawn) == ["fact"] * 4 + ["sentence"] * 4
    assert all("Landa" not in q.text for q in drawn)
    assert all(q.answer in (facts + wiki)[q.gold][1] for q in drawn)
    with pytest.raises(ValueError, match="use more"):
        draw(facts + wiki, 100, seed=1)


def test_hits():
    fact = Question("fact", "What is the capital of Fiji?", "The capital of Fiji is", "Suva", 0)
    assert is_hit(fact, " suva, on Viti Levu") and not is_hit(fact, " Nadi")
    text = Question("sentence", "What is Ufa?", "Ufa is", "the capital and largest city of Bashkortostan.", 0)
    assert is_hit(text, " a city, the largest one") and not is_hit(text, " Ufa is Ufa in the capital")


def test_the_answers_shown_are_half_helped_half_not():
    entries = [{"n": i, "hit": {"none": i == 0, "memory": i in (0, 3, 5, 6), "rag": True}} for i in range(8)]
    assert [e["n"] for e in chosen(entries, 4)] == [0, 1, 3, 5]
    assert [e["n"] for e in chosen(entries[:3], 4)] == [0, 1, 2]


def test_a_demo_asks_about_titles_that_no_adapter_saw(monkeypatch):
    from memory3 import data
    from memory3.data import Entry
    from memory3.demo.run import choose_entries, held_out
    from memory3.train.holdout import split_of

    def corpus(source):
        return lambda: iter(Entry(f"{source} {i} - Capital", f"text {i}", source) for i in range(200))

    monkeypatch.setattr(data, "wiki", corpus("wiki"))
    monkeypatch.setattr(data, "factbook", corpus("factbook"))
    some = choose_entries(lambda text: list(range(len(text.split()))), 128, 40, 0)
    assert [e.source for e in some] == ["wiki"] * 20 + ["factbook"] * 20
    assert all(split_of(e.title) != "train" for e in some[:20])
    assert all(split_of(e.title.partition(" - ")[0]) != "train" for e in some[20:])  # a country is in one split
    every = choose_entries(lambda text: list(range(len(text.split()))), 128, 400, 0)
    assert len(every) == 400 and some[0] == every[0]
    assert not held_out(next(as_chunk(e) for e in every if split_of(e.title) == "train" and e.source == "wiki"))


def as_chunk(entry):
    from memory3.bank.corpus import Chunk

    return Chunk(entry.title, entry.text, [1], entry.source, 0, len(entry.text))
