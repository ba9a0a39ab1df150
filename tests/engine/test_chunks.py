"""The chunk rule: who asks, with which tokens, and how often."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory3.chunks import cut

from .common import TOKENIZER, prompt


def asked(engine):
    """Query texts in the order they were embedded."""
    return [text for batch in engine.embedder.asked for text in batch]


def text(ids):
    return TOKENIZER.decode(ids, skip_special=True)


def test_cut():
    assert cut(128, 64, 16, False) == [(0, 64, True), (64, 128, True)]
    assert cut(79, 64, 16, False) == [(0, 64, True), (64, 79, False)]
    assert cut(80, 64, 16, False) == [(0, 64, True), (64, 80, True)]
    assert cut(5, 64, 16, False) == [(0, 5, True)]
    assert cut(5, 64, 16, True) == [(0, 5, False)]
    assert cut(16, 64, 16, True) == [(0, 16, True)]
    assert cut(0, 64, 16, False) == []


@given(st.integers(0, 500), st.integers(1, 70), st.integers(0, 100), st.booleans())
def test_cut_covers_everything_and_only_the_last_is_silent(tokens, chunk, min_query, has_previous):
    pieces = cut(tokens, chunk, min_query, has_previous)
    assert [t for p in pieces for t in range(p.start, p.end)] == list(range(tokens))
    assert all(p.asks and p.end - p.start == chunk for p in pieces[:-1])


def test_three_retrievals_for_128_in_and_128_out(engine):
    engine = engine()
    ids = prompt(128)
    run = engine.generate([ids], max_new_tokens=128, ignore_eos=True)[0]
    assert run.stats.retrievals == 3 and len(run.token_ids) == 128
    assert asked(engine) == [text(ids[:64]), text(ids[64:]), text(run.token_ids[:64])]
    reads = [(r.where, r.start, r.end) for r in run.reads]
    assert reads == [("prompt", 0, 64), ("prompt", 64, 128), ("generated", 0, 64), ("generated", 64, 128)]
    assert run.reads[2].ids == run.reads[1].ids, "the first generated chunk inherits"
    assert [r.query for r in run.reads] == [text(ids[:64]), text(ids[64:]), text(ids[64:]), text(run.token_ids[:64])]


@pytest.mark.parametrize(("tokens", "queries"), [(64, 1), (65, 2), (128, 2), (129, 3), (193, 4)])
def test_generated_chunks(engine, tokens, queries):
    """The 64th token asks before its own pass, so 65 tokens need two retrievals and 64 only one."""
    engine = engine()
    run = engine.generate([prompt(20)], max_new_tokens=tokens, ignore_eos=True)[0]
    out = run.token_ids
    assert asked(engine)[1:] == [text(out[i : i + 64]) for i in range(0, 64 * (queries - 1), 64)]
    assert run.reads[-1].end == tokens


@pytest.mark.parametrize("tail", [0, 1, 15, 16, 63])
def test_partial_last_prompt_chunk(engine, tail):
    engine = engine()
    ids = prompt(64 + tail)
    run = engine.generate([ids], max_new_tokens=1)[0]
    if tail >= 16:
        assert asked(engine) == [text(ids[:64]), text(ids[64:])]
        assert [(r.start, r.end) for r in run.reads] == [(0, 64), (64, 64 + tail)]
    else:
        assert asked(engine) == [text(ids[:64])]
        assert [(r.start, r.end) for r in run.reads] == [(0, 64 + tail)]


def test_short_first_prompt_asks(engine):
    engine = engine()
    run = engine.generate([prompt(2)], max_new_tokens=1)[0]
    assert asked(engine) == [text(prompt(2))]
    assert len(run.reads[0].ids) == 3 and run.reads[0].scores == sorted(run.reads[0].scores, reverse=True)


def test_the_opening_belongs_to_no_query(engine, spy, model):
    """A prompt that begins with the context BOS gets no second one; then it is part of its first chunk."""
    passes = spy(model)
    first = engine()
    a = first.generate([prompt(70)], max_new_tokens=1)[0]
    second = engine()
    b = second.generate([[1, *prompt(69)]], max_new_tokens=1)[0]
    assert asked(first)[0] == text(prompt(70)[:64]) and asked(second)[0] == text(prompt(63))
    assert a.reads[0].end == 70 and b.reads[0].end == 70
    assert a.stats.prompt_tokens == 71 and b.stats.prompt_tokens == 70 and len(passes) == 2


@pytest.mark.parametrize("slots", [3, 4, 7, 9])
def test_a_small_arena_takes_several_passes(engine, spy, model, slots):
    """Same logits, same reads, whatever the arena holds at once."""
    ids = [prompt(64 * 5 + 20, "a")]
    passes = spy(model)
    whole = engine(slots=100).generate(ids, max_new_tokens=70, ignore_eos=True)[0]
    one, more = list(passes), passes
    passes.clear()
    run = engine(slots=slots).generate(ids, max_new_tokens=70, ignore_eos=True)[0]
    kinds = [kind for kind, _ in more]
    assert [kind for kind, _ in one].count("prefill") == 1 and kinds.count("prefill") == -(-6 // (slots // 3))
    torch.testing.assert_close(more[kinds.count("prefill") - 1][1], one[0][1], rtol=1e-4, atol=1e-3)
    assert run.token_ids == whole.token_ids
    for read, same in zip(run.reads, whole.reads, strict=True):
        # Queries searched together are one matrix product, which rounds scores otherwise than one query does.
        assert read.scores == pytest.approx(same.scores, rel=1e-6)
        assert {**read.to_dict(), "scores": None} == {**same.to_dict(), "scores": None}


def test_several_passes_of_a_ragged_batch(engine):
    """Prompts that end in different passes."""
    ids = [prompt(n, n) for n in (200, 10, 70, 330)]
    whole = engine(slots=100).generate(ids, max_new_tokens=3, collect_mass=True)
    split = engine(slots=12).generate(ids, max_new_tokens=3, collect_mass=True)
    for a, b in zip(whole, split, strict=True):
        assert a.token_ids == b.token_ids
        assert [(r.start, r.end, r.ids) for r in a.reads] == [(r.start, r.end, r.ids) for r in b.reads]
        for x, y in zip(a.reads, b.reads, strict=True):
            assert x.mass == pytest.approx(y.mass, abs=1e-4) and x.mass_rows == y.mass_rows
