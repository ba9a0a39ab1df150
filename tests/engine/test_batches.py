"""Ragged batches give what each sequence gives alone."""

import pytest
import torch

from memory3 import Engine
from memory3.decoding import Options, write_on
from memory3.sampling import Sampling
from memory3.session import Session

from .common import HashEmbedder, prompt

LENGTHS = (200, 3, 64, 80, 129)


def same(one, other):
    assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
    assert one.prompt_tokens == other.prompt_tokens
    assert [(r.where, r.start, r.end, r.ids, r.query) for r in one.reads] == [
        (r.where, r.start, r.end, r.ids, r.query) for r in other.reads
    ]


@pytest.mark.parametrize("mode", ["memory", "none", "rag"])
def test_ragged_batch_equals_one_by_one(engine, mode):
    engine = engine(mode=mode)
    ids = [prompt(n, n) for n in LENGTHS]
    together = engine.generate(ids, max_new_tokens=70, ignore_eos=True)
    for one, b in zip(ids, together, strict=True):
        same(engine.generate([one], max_new_tokens=70, ignore_eos=True)[0], b)


def test_logits_of_a_ragged_batch(engine, model, spy):
    engine = engine(slots=100)
    ids = [prompt(n, n) for n in LENGTHS]
    passes = spy(model)
    engine.generate(ids, max_new_tokens=66, ignore_eos=True)
    together = [logits for _, logits in passes]
    for b, one in enumerate(ids):
        passes.clear()
        engine.generate([one], max_new_tokens=66, ignore_eos=True)
        for alone, row in zip(passes, together, strict=True):
            assert (alone[1][0] - row[b]).norm() / row[b].norm() < 1e-4


@pytest.fixture
def ends_early(engine, monkeypatch):
    """An engine whose end token is one that sequence 1 says after a while; returns it with the prompts."""
    made = engine()
    ids = [prompt(n, n) for n in (90, 30, 150)]
    runs = made.generate(ids, max_new_tokens=75, ignore_eos=True)
    said = [run.token_ids for run in runs]
    for n in range(10, 60):
        token = said[1][n]
        if said[1].index(token) == n and all(token not in said[b] for b in (0, 2)):
            break
    else:
        pytest.fail("no token that only sequence 1 says")
    monkeypatch.setattr(made.model.tokenizer, "eos_ids", (token,))
    return made, ids, runs, n


def test_one_sequence_ends_early(ends_early):
    engine, ids, runs, n = ends_early
    engine.embedder.asked.clear()
    ended = engine.generate(ids, max_new_tokens=75)
    assert ended[1].finish == "stop" and ended[1].token_ids == runs[1].token_ids[:n]
    for b in (0, 2):
        same(ended[b], runs[b])
    assert [len(batch) for batch in engine.embedder.asked] == [6, 2], "nothing is retrieved for who has ended"
    for one, b in zip(ids, ended, strict=True):
        same(engine.generate([one], max_new_tokens=75)[0], b)


def test_ended_sequence_with_mass_and_prefetch(ends_early):
    engine, ids, runs, n = ends_early
    engine = Engine(engine.model, engine.bank, HashEmbedder(), prefetch=63 - n + 5 if n > 10 else 50, slots=64)
    ended = engine.generate(ids, max_new_tokens=75, collect_mass=True)
    assert ended[1].finish == "stop" and len(ended[0].token_ids) == 75
    assert all(len(r.mass) == len(r.ids) for run in ended for r in run.reads)
    assert engine.arena.pinned == 0


def test_kv_bytes_of_a_batch_with_an_early_end(ends_early):
    """Each sequence counts the rows and memories it held when it ended."""
    engine, ids, _, n = ends_early
    stats = engine.generate(ids, max_new_tokens=75)[0].stats
    config, memory = engine.model.config, engine.model.memory
    row = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    rows = [memory.prefix_len + 1 + len(p) for p in ids]
    fed = [74, n, 74]  # neither the last token nor an end token is fed
    record = engine.arena.kv[0].numel() * 4
    assert stats.kv_bytes == (sum(rows) * row + sum(fed) * row + 3 * 3 * record) // 3


def test_sampled_batch_equals_one_by_one(engine):
    """Sequence b draws from seed + b, whatever the others do."""
    engine = engine()
    ids = [prompt(n, n) for n in (90, 30)]
    together = engine.generate(ids, max_new_tokens=20, sampling=Sampling(0.8, seed=5), ignore_eos=True)
    for b, one in enumerate(ids):
        alone = engine.generate([one], max_new_tokens=20, sampling=Sampling(0.8, seed=5 + b), ignore_eos=True)[0]
        assert alone.token_ids == together[b].token_ids
    twice = engine.generate([ids[0], ids[0]], max_new_tokens=20, sampling=Sampling(0.8, seed=5), ignore_eos=True)
    assert twice[0].token_ids != twice[1].token_ids


def test_only_the_full_sequence_ends_with_context(engine, model):
    """One sequence runs out of positions; the others go on to their length."""
    engine = engine()
    limit = model.config.max_context - model.memory.span - model.memory.prefix_len - 1  # tokens after the BOS
    ids = [prompt(limit - 5, "x"), prompt(20, "y")]
    long, short = engine.generate(ids, max_new_tokens=30, ignore_eos=True)
    assert long.finish == "context" and len(long.token_ids) == 6  # the last one is said but not fed
    assert short.finish == "length" and len(short.token_ids) == 30
    same(engine.generate([ids[0]], max_new_tokens=30, ignore_eos=True)[0], long)
    same(engine.generate([ids[1]], max_new_tokens=30, ignore_eos=True)[0], short)


def test_mixed_openings(engine):
    """One prompt already begins with the context BOS (a chat template's), the other does not."""
    engine = engine()
    ids = [[1, *prompt(100, "a")], prompt(100, "b")]
    for one, b in zip(ids, engine.generate(ids, max_new_tokens=5), strict=True):
        same(engine.generate([one], max_new_tokens=5)[0], b)


def test_keep_reorders_rows(engine):
    """A session goes on with any rows in any order."""
    engine = engine()
    ids = [prompt(n, n) for n in (90, 30, 150)]
    alone = engine.generate([ids[2]], max_new_tokens=8, ignore_eos=True)[0]
    with torch.inference_mode(), Session(engine, 3, 400) as session:
        logits = session.feed(ids, [(1,)] * 3)
        session.keep([2, 0])
        runs = write_on(session, logits[[2, 0]], [150, 90], 0.0, Options(8, ignore_eos=True))
        assert runs[0].token_ids == alone.token_ids
