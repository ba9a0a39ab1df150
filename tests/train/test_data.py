"""Sequences, their references, and questions: what is trained on is what it is said to be."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from model.common import TINY_MEMORY, tiny

from memory3 import Bank, MemoryModel
from memory3.data import Entry
from memory3.train.config import TrainConfig
from memory3.train.overlap import overlap
from memory3.train.qa import MIX, Item, QuestionSource, Reader, Retriever, ask_about
from memory3.train.questions import cloze, questions_about, reverse
from memory3.train.text import ChunkedSource, TextSource, cut_sequences, pick, retrieve_for_chunks, token_stream
from memory3.train.tokenizer import train_tokenizer

ARTICLES = [
    Entry(
        f"Town {name}",
        f"Town {name} is a settlement on the river {name}ia with an old stone bridge. It was founded in {1200 + 7 * i} "
        f"by Lord {name}or, who kept {20 + i} horses there. The market of {name}ham opens at noon.",
        "made up",
    )
    for i, name in enumerate(["Arl", "Bex", "Cor", "Dun", "Elm", "Fal", "Gar", "Hov", "Ist", "Jor", "Kel", "Lom"] * 4)
]
for number, article in enumerate(ARTICLES):  # four of each name, told apart by their titles
    ARTICLES[number] = Entry(f"{article.title}{number}", article.text.replace("Town ", f"Town{number} "), "made up")


class Letters:
    """Bytes hashed into 64 buckets."""

    name = "letters"

    def encode(self, texts) -> np.ndarray:
        out = np.full((len(texts), 64), 1e-3, np.float32)
        for i, text in enumerate(texts):
            for word in text.split():
                out[i, zlib.crc32(word.encode()) % 64] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def model():
    return MemoryModel(tiny(), train_tokenizer([a.text for a in ARTICLES], 400), "tiny")


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory):
    with Bank.create(tmp_path_factory.mktemp("bank") / "b", model.identity(embedder="letters")) as bank:
        texts = [a.text for a in ARTICLES]
        bank.add_cold(
            texts, [model.tokenizer.encode_reference(t)[:60] for t in texts], Letters().encode(texts),
            titles=[a.title for a in ARTICLES], sources=["made up"] * len(texts),
        )  # fmt: skip
        yield bank


def test_every_epoch_is_a_permutation_whatever_the_batch():
    order = [i for step in range(5) for i in pick(10, step, 4, 0)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert [i for step in range(20) for i in pick(10, step, 1, 0)] == order
    assert [i for step in range(20) for i in pick(10, step, 1, 1)] != order


def test_text_is_all_there_and_ends_are_marked(model):
    stream = token_stream(["one river", "two"], model.tokenizer, seed=3)
    ends = [i for i, t in enumerate(stream.tolist()) if t == 0]
    assert len(ends) == 2 and ends[-1] == len(stream) - 1
    sequences = cut_sequences(np.arange(25), 8)
    assert sequences.shape == (3, 8) and sequences[2, 7] == 23
    sample = TextSource(sequences, 2, 0, (1,)).sample(1)
    assert sample.ids == (1, *range(8, 16)) and sample.first == 1 and not sample.pieces
    with pytest.raises(ValueError, match="more text"):
        cut_sequences(np.arange(5), 8)


def test_a_chunk_reads_its_own_reference_and_those_of_the_chunks_before(model):
    retrieved = np.array([[3, -1, 4, 3, 5, 6, 7]], np.int32)
    records = [bytes([i]) for i in range(10)]
    source = ChunkedSource(np.arange(2, 54)[None], 1, 0, TINY_MEMORY, records, retrieved)
    sample = source.sample(0)
    ends = [p.end for p in sample.pieces]
    assert ends == [9, 17, 25, 33, 41, 49, 53]  # chunks of 8 tokens behind the opening token
    reads = [[r[0] for r in p.reads] for p in sample.pieces]
    assert reads == [[3], [3], [3, 4], [3, 4], [3, 4, 5], [4, 3, 5, 6], [4, 3, 5, 6, 7]]


def test_references_that_give_the_sequence_away_are_refused(model, bank, tmp_path):
    """The text is the references themselves: the most similar one is always the one to refuse."""
    stream = token_stream([a.text for a in ARTICLES[:8]], model.tokenizer)
    sequences = cut_sequences(stream, 64)
    args = (sequences, 8, bank, Letters(), model.tokenizer.decode)
    records, found = retrieve_for_chunks(*args, cache=tmp_path / "found.npz")
    assert found.shape == (len(sequences), 8) and (found >= 0).mean() > 0.5
    for sequence, row in zip(sequences.tolist(), found.tolist(), strict=True):
        assert all(overlap(sequence, bank.token_ids(records[n])) <= 0.9 for n in row if n >= 0)
    _, everything = retrieve_for_chunks(*args, limit=1.0)
    assert (everything != found).any()

    class Refuses:
        name = "letters"

        def encode(self, texts):
            raise AssertionError("the cache was not used")

    again = retrieve_for_chunks(sequences, 8, bank, Refuses(), model.tokenizer.decode, cache=tmp_path / "found.npz")
    assert (again[1] == found).all()


def test_questions_are_answered_by_their_sentence():
    article = ARTICLES[0]
    asked = list(questions_about(article.title, article.text, "made up", random.Random(0)))
    assert {q.kind for q in asked} >= {"cloze"}
    assert all(q.answer in article.text for q in asked)
    assert all(q.answer not in q.prompt for q in asked if q.kind == "cloze")
    assert cloze("Town", "It opened in 1889 near the sea.", random.Random(0)) == (
        "Town: It opened in what year near the sea?", "1889",
    )  # fmt: skip
    assert cloze("Town", "It is a quiet place.", random.Random(0)) is None
    assert reverse("Touchscreen", "A touchscreen is a display that can detect touch input from a user.") == (
        "What is a display that can detect touch input from a user?", "touchscreen",
    )  # fmt: skip
    assert reverse("Bridge", "A stone bridge is a bridge that is made of stone by masons.") is None


def test_questions_keep_to_their_split_and_chunk(model, bank):
    asked = ask_about(bank, model.tokenizer, TINY_MEMORY)
    assert {s for s in asked.split.values()} == {"train", "dev", "test"}
    for split, items in asked.items.items():
        assert all(asked.split[i.gold] == split for i in items)
        assert all(0 < len(i.prompt) <= TINY_MEMORY.chunk for i in items)
        assert len({i.prompt for i in items}) == len(items)

    class Guard:
        def shares(self, text):
            return "Arl" in text

    guarded = ask_about(bank, model.tokenizer, TINY_MEMORY, Guard())
    assert all("Arl" not in bank.text(i.gold) for items in guarded.items.values() for i in items)
    assert guarded.split == asked.split


@pytest.fixture(scope="module")
def items(model, bank):
    reference = {a.text: a for a in ARTICLES}
    made = []
    for n, record in enumerate(bank.ids()):
        title = reference[bank.text(record)].title
        kind = list(MIX)[n % len(MIX)]
        made.append(Item(kind, tuple(model.tokenizer.encode(f"{title}?")), (5, 6), record))
    return made


@pytest.fixture
def retriever(model, bank):
    return Retriever(bank, Letters(), model.tokenizer.decode)


def config(**options):
    return TrainConfig(shape=tiny().config, stage="sft", batch=64, **options)


def test_gold_is_read_unless_it_is_dropped(bank, items, retriever):
    reader, records = Reader(TINY_MEMORY, bank.token_ids), set(bank.ids())
    golds = {(i.prompt, i.answer): i for i in items}

    def reads(**options):
        source = QuestionSource(items, reader, config(**options), records, retriever)
        assert source.samples(3) == source.samples(3) != source.samples(4)
        for sample in source.samples(3):
            item = golds[sample.ids[1 : sample.first], sample.ids[sample.first :]]
            yield item, sample.pieces[0].reads if sample.pieces else ()

    assert all(item.gold in found and len(set(found)) == 5 for item, found in reads(drop_memory=0, drop_gold=0))
    assert all(item.gold not in found and len(set(found)) == 5 for item, found in reads(drop_memory=0, drop_gold=1))
    shared = list(reads(drop_memory=0, drop_gold=0, own_refs=1, borrow=16))
    assert all(found[0] == item.gold and len(set(found)) == 5 for item, found in shared)
    assert len({r for _, found in shared for r in found}) <= 64  # 5 references for each of 64 would be 320
    assert all(item.gold not in found for item, found in reads(drop_memory=0, drop_gold=1, own_refs=2))
    dropped = [not found for _, found in reads(drop_memory=0.5, drop_gold=0)]
    assert 16 < sum(dropped) < 48 and all(not found for _, found in reads(read="none"))


def test_a_question_reads_memory_text_or_nothing(bank, items, retriever):
    reader, (item,) = Reader(TINY_MEMORY, bank.token_ids), retriever(items[:1])
    body = (*TINY_MEMORY.context_bos_ids, *item.prompt, *item.answer)
    memory = reader.sample(item, "memory", item.found[:2])
    assert memory.ids == body and memory.pieces[0] == (len(body), item.found[:2])
    plain = reader.sample(item, "none", ())
    assert plain.ids == body and plain.pieces == () and plain.ids[plain.first :] == item.answer
    text = reader.sample(item, "text", item.found[:2])
    first, second = (bank.token_ids(r)[: TINY_MEMORY.span] for r in item.found[:2])
    prefix = TINY_MEMORY.prefix_ids  # the most similar stands last
    assert text.ids == (*prefix, *second, *prefix, *first, *body) and text.ids[text.first :] == item.answer


def test_only_allowed_references_are_read(bank, items, retriever):
    allowed = {i.gold for i in items[::2]}
    source = QuestionSource(
        items[::2], Reader(TINY_MEMORY, bank.token_ids), config(drop_memory=0, drop_gold=0.3), allowed, retriever
    )
    assert {r for s in source.samples(0) for p in s.pieces for r in p.reads} <= allowed


def test_the_retriever_asks_once_per_question(bank, items, retriever, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Letters, "encode", lambda self, texts, run=Letters.encode: asked.extend(texts) or run(self, texts)
    )
    found = retriever([items[0], items[1], items[0]])
    assert found[0] == found[2] and len(found[0].found) == 16 and len(asked) == 2
    assert retriever(items[:2]) == found[:2] and len(asked) == 2
