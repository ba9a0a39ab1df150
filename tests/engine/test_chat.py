"""Conversations: what earlier turns left in the cache equals feeding everything at once."""

from dataclasses import replace

import pytest
import torch

from memory3 import ContextFull, Engine
from memory3.chat import Chat

from .common import CONFIG, MEMORY, TOKENIZER, HashEmbedder, make_model, words

TURNS = [words(n, f"turn {n}") for n in (12, 30, 3, 9)]


def at_once(engine, messages):
    """The answer to messages fed from an empty cache."""
    return engine.generate([TOKENIZER.chat(messages)], max_new_tokens=12)[0]


def test_turns_equal_feeding_all_at_once(engine, spy, model):
    made = engine(mode="none")
    passes = spy(model)
    chat = Chat(made, system="be brief")
    for text in TURNS:
        passes.clear()
        answer = chat.send(text, max_new_tokens=12)
        logits = passes[0][1]
        passes.clear()
        whole = at_once(made, chat.messages[:-1])
        assert answer.token_ids == whole.token_ids and answer.text == whole.text
        assert (logits - passes[0][1]).norm() / logits.norm() < 1e-4
    assert [m["role"] for m in chat.messages] == ["system"] + ["user", "assistant"] * 4
    assert [m["content"] for m in chat.messages[1::2]] == TURNS


def test_only_new_tokens_are_fed(engine):
    """Each turn, and of the answer before what reads back otherwise than it was generated."""
    made = engine(mode="none")
    chat, fed = Chat(made), 0
    for text in TURNS:
        answer = chat.send(text, max_new_tokens=12)
        tokens = TOKENIZER.chat(chat.messages[:-1])
        assert answer.stats.prompt_tokens <= len(tokens) - fed + 12 + 8
        fed = len(tokens)


def test_rewinds_when_the_answer_tokenizes_differently(engine, monkeypatch):
    """The answer said letter by letter; in the template it is words."""
    made = engine(mode="none")
    letters = [TOKENIZER.encode(c)[0] for c in "river stone"]
    assert TOKENIZER.encode("river stone") != letters
    script = iter(letters)

    def scripted(logits, *_):
        return torch.tensor([next(script, 0)])

    chat = Chat(made)
    with monkeypatch.context() as patch:
        patch.setattr("memory3.decoding.sample", scripted)
        first = chat.send("hello")
        assert first.text == "river stone" and first.token_ids == letters and first.finish == "stop"
    second = chat.send(TURNS[0], max_new_tokens=12)
    assert second.token_ids == at_once(made, chat.messages[:-1]).token_ids
    assert second.stats.prompt_tokens > len(TOKENIZER.encode(TURNS[0])) + 2 + len(TOKENIZER.encode("river stone"))


def test_every_turn_reads_its_own_memories(engine):
    """A long turn asks with its own tokens; a short one keeps what the turn before read last."""
    made = engine(model=make_model(replace(MEMORY, min_query=40)))
    chat = Chat(made)
    first = chat.send(TURNS[0], max_new_tokens=70)
    second = chat.send(TURNS[1], max_new_tokens=5)
    assert "user" in first.reads[0].query and TURNS[0][:20] in first.reads[0].query
    asked = "".join(r.query for r in second.reads if r.where == "prompt")
    assert TURNS[1][:40] in asked
    assert first.reads[0].where == second.reads[0].where == "prompt"
    assert second.reads[0].start == first.prompt_tokens
    assert second.reads[-1].where == "generated" and second.reads[-1].start == 0
    before = len(made.embedder.asked)
    short = chat.send("a", max_new_tokens=5)
    assert short.prompt_tokens < 40 and len(made.embedder.asked) == before
    assert [r.where for r in short.reads] == ["prompt", "generated"]
    assert all(r.ids == second.reads[-1].ids for r in short.reads)
    assert made.arena.pinned == 3
    chat.close()
    assert made.arena.pinned == 0


def test_mass_can_be_switched_per_turn(engine):
    chat = Chat(engine())
    assert not chat.send(TURNS[0], max_new_tokens=3).reads[0].mass
    assert all(len(r.mass) == 3 for r in chat.send(TURNS[1], max_new_tokens=3, collect_mass=True).reads)
    chat.close()


@pytest.mark.parametrize("mode", ["memory", "none"])
def test_a_full_context_leaves_the_chat_usable(engine, mode):
    made = engine(mode=mode)
    chat = Chat(made, capacity=200)
    first = chat.send(TURNS[0], max_new_tokens=12)
    messages = list(chat.messages)
    with pytest.raises(ContextFull, match="start a new Chat"):
        chat.send(words(200, "long"))
    assert chat.messages == messages
    other = Chat(made, capacity=200)
    assert other.send(TURNS[0], max_new_tokens=12).token_ids == first.token_ids
    a, b = (c.send(TURNS[3], max_new_tokens=12) for c in (chat, other))
    assert a.token_ids == b.token_ids and [r.ids for r in a.reads] == [r.ids for r in b.reads]
    chat.close()
    other.close()


def test_an_answer_that_fills_the_context(engine):
    made = engine(mode="none")
    chat = Chat(made, capacity=60)
    answer = chat.send("hi", max_new_tokens=200)
    assert answer.finish in ("context", "stop")
    if answer.finish == "context":
        with pytest.raises(ContextFull):
            chat.send(TURNS[0])


@pytest.mark.parametrize("mode", ["memory", "none"])
def test_slides_past_the_context(bank, mode):
    """Ten turns through a window that holds about two; the system message's tokens are long gone, nothing breaks."""
    small = make_model(MEMORY, replace(CONFIG, max_context=330))
    made = Engine(small, bank, HashEmbedder(), mode=mode, slots=32)
    chat = Chat(made, "be brief", overflow="slide")
    total = 0
    for i in range(10):
        answer = chat.send(words(12, i), max_new_tokens=20)
        total += answer.prompt_tokens + len(answer.token_ids)
        assert answer.text is not None and answer.finish in ("length", "stop")
    assert total > 330
    long = chat.send(words(90, "longer than the window"), max_new_tokens=5)
    assert long.finish in ("length", "stop")
    chat.close()
    if mode == "memory":
        assert made.arena.pinned == 0


def test_an_interrupted_turn_is_forgotten(engine):
    """Ctrl-C in the middle of an answer: the next turn continues the conversation without it."""
    made = engine(mode="none")
    chat, other = Chat(made), Chat(made)
    for one in (chat, other):
        one.send(TURNS[0], max_new_tokens=12)
    pieces = []

    def interrupt(_, piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.send(TURNS[1], max_new_tokens=40, on_text=interrupt)
    assert len(chat.messages) == 2
    a, b = (c.send(TURNS[3], max_new_tokens=12) for c in (chat, other))
    assert a.token_ids == b.token_ids


def test_prefetch_across_turns(model, bank):
    made = Engine(model, bank, HashEmbedder(), slots=32, prefetch=40)
    chat = Chat(made)
    for text in TURNS[:3]:
        chat.send(text, max_new_tokens=30)  # a prefetch is asked for after 24 tokens and never used
    chat.close()
    assert made.arena.pinned == 0


def test_rag_is_refused(engine):
    with pytest.raises(ValueError, match='got "rag"'):
        Chat(engine(mode="rag"))
