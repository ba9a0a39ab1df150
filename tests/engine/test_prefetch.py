"""Prefetch: the next memories are fetched in the background, some tokens early."""

import threading

import pytest
import torch

from memory3 import Engine
from memory3.session import Session

from .common import TOKENIZER, HashEmbedder, prompt
from .oracle import Retriever, logits_of


def text(ids):
    return TOKENIZER.decode(ids, skip_special=True)


class ThreadedEmbedder(HashEmbedder):
    """Also remembers on which thread it ran; `fail_at`: number of the call that fails; `hold`: waited for there."""

    def __init__(self, fail_at=None, hold=None):
        super().__init__()
        self.threads, self.fail_at, self.hold = [], fail_at, hold

    def encode(self, texts):
        self.threads.append(threading.current_thread())
        if len(self.threads) == self.fail_at:
            raise OSError("the encoder is gone")
        if len(self.threads) > 1 and self.hold is not None:
            assert self.hold.wait(20)
        return super().encode(texts)


def test_query_and_use(model, bank, spy):
    """The query is what was there 8 tokens early; the memories change where they change without prefetch."""
    engine = Engine(model, bank, ThreadedEmbedder(), prefetch=8, slots=16)
    passes = spy(model)
    ids = prompt(50)
    run = engine.generate([ids], max_new_tokens=140, ignore_eos=True)[0]
    out = run.token_ids
    assert [r.query for r in run.reads] == [text(ids)] * 2 + [text(out[:56]), text(out[64:120])]
    assert [(r.start, r.end) for r in run.reads] == [(0, 50), (0, 64), (64, 128), (128, 140)]
    main = threading.main_thread()
    assert [t is main for t in engine.embedder.threads] == [True, False, False]
    retriever = Retriever(bank, HashEmbedder())
    sets = [retriever(r.query, 3) for r in run.reads]
    assert [r.ids for r in run.reads] == sets
    rows = [sets[0]] * (51 + 63) + [sets[2]] * 64 + [sets[3]] * (139 - 127)
    want = logits_of(model, [1, *ids, *out[:-1]], [[retriever.memories[i] for i in row] for row in rows])[50:]
    got = torch.cat([logits for _, logits in passes])
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-4
    assert engine.arena.pinned == 0


def test_same_query_same_text(model, bank):
    """Where the early query finds the same references, nothing else differs."""

    class Constant(HashEmbedder):
        def vector(self, text):
            return super().vector("river stone")

    exact = Engine(model, bank, Constant(), slots=16).generate([prompt(50)], max_new_tokens=130, ignore_eos=True)[0]
    early = Engine(model, bank, Constant(), slots=16, prefetch=20)
    run = early.generate([prompt(50)], max_new_tokens=130, ignore_eos=True)[0]
    assert run.token_ids == exact.token_ids
    assert [r.ids for r in run.reads] == [r.ids for r in exact.reads]
    assert run.stats.retrievals == exact.stats.retrievals == 3


def test_decoding_goes_on_meanwhile(model, bank, monkeypatch):
    """The background waits until four more tokens were decoded: a foreground retrieval would hang."""
    hold, steps = threading.Event(), []
    engine = Engine(model, bank, ThreadedEmbedder(hold=hold), prefetch=10, slots=16)
    decode = model.net.decode

    def counted(*args):
        steps.append(1)
        if len(steps) == 58:
            hold.set()
        return decode(*args)

    monkeypatch.setattr(model.net, "decode", counted)
    run = engine.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)[0]
    assert len(run.token_ids) == 70 and run.reads[-1].query == text(run.token_ids[:54])
    assert run.stats.times["wait for prefetch"] >= 0


def test_error_in_the_background_surfaces(model, bank):
    engine = Engine(model, bank, ThreadedEmbedder(fail_at=2), prefetch=10, slots=16)
    with pytest.raises(OSError, match="the encoder is gone"):
        engine.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)
    assert engine.arena.pinned == 0
    assert len(engine.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)[0].token_ids) == 70


def test_unused_prefetch_is_let_go(model, bank):
    """The run ends between asking and using: nothing stays pinned, and an unread failure does not matter."""
    engine = Engine(model, bank, HashEmbedder(), prefetch=10, slots=16)
    run = engine.generate([prompt(20)], max_new_tokens=60, ignore_eos=True)[0]
    assert run.stats.retrievals == 2 and engine.arena.pinned == 0
    failing = Engine(model, bank, ThreadedEmbedder(fail_at=2), prefetch=10, slots=16)
    assert len(failing.generate([prompt(20)], max_new_tokens=60, ignore_eos=True)[0].token_ids) == 60
    assert failing.arena.pinned == 0


def test_feeding_drops_a_pending_prefetch(model, bank):
    """As a chat does: the next turn comes while memories for the old answer are on their way."""
    engine = Engine(model, bank, HashEmbedder(), prefetch=10, slots=16)
    with torch.inference_mode(), Session(engine, 1, 400) as session:
        session.feed([prompt(20)], [(1,)])
        for token in prompt(56, "said"):
            session.step(torch.tensor([token]))
        session.feed([prompt(40, "next")])
        assert engine.arena.pinned == 3
    assert engine.arena.pinned == 0


def test_prefetch_needs_room_for_both_sets(model, bank):
    exact = Engine(model, bank, HashEmbedder(), slots=3)
    assert len(exact.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)[0].token_ids) == 70
    early = Engine(model, bank, HashEmbedder(), slots=3, prefetch=5)
    with pytest.raises(RuntimeError, match="3 slots; raise slots"):
        early.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)
    assert early.arena.pinned == 0
