"""What an engine refuses, and the plain facts of a run: modes, sizes, statistics."""

from dataclasses import replace

import pytest

from memory3 import ContextFull, Engine
from memory3.bank import IdentityMismatch

from .common import MEMORY, TOKENIZER, HashEmbedder, make_bank, make_model, prompt


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "model_hash"),
        ({"memory": replace(MEMORY, tokens=5)}, "tokens"),
        ({"memory": replace(MEMORY, layers=(0, 1, 2))}, "layers"),
        ({"memory": replace(MEMORY, rule="causal")}, "rule"),
        ({"memory": replace(MEMORY, prefix_ids=(1, 7))}, "prefix_ids"),
        ({"memory": replace(MEMORY, context_bos_ids=())}, "context_bos_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_a_bank_of_another_model(bank, change, field):
    with pytest.raises(IdentityMismatch, match=field):
        Engine(make_model(**change), bank, HashEmbedder())


def test_refuses_a_bank_of_another_embedder(model, bank):
    with pytest.raises(IdentityMismatch, match="embedder.*other"):
        Engine(model, bank, HashEmbedder("other"))


def test_chunk_and_refs_may_differ_from_the_bank(bank):
    """They say how memories are read, not what they are."""
    engine = Engine(make_model(replace(MEMORY, chunk=32, refs=1)), bank, HashEmbedder())
    run = engine.generate([prompt(64)], max_new_tokens=1)[0]
    assert [len(r.ids) for r in run.reads] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "text"}, "mode: expected one of memory, rag, none, got 'text'"),
        ({"refs": -1}, "refs: expected 0 or more, got -1"),
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"prefetch": 64}, r"prefetch: expected 0 \(off\) to 63 tokens, got 64"),
        ({"prefetch": -1}, "prefetch"),
    ],
)
def test_bad_options(model, bank, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, bank, HashEmbedder(), **options)


@pytest.mark.parametrize("mode", ["memory", "rag"])
def test_mode_without_a_bank(model, mode):
    with pytest.raises(ValueError, match="needs a bank, got None"):
        Engine(model, mode=mode)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected at least one"),
        ("", {}, "prompt: expected some text"),
        ([[5], []], {}, "prompt: expected some text"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ("a", {"stop": ["x", ""]}, "stop: expected non-empty texts"),
        ("a", {"overflow": "wrap"}, "overflow must be"),
    ],
)
def test_bad_calls(engine, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(prompts, **options)


def test_a_single_text_gives_a_single_result(engine):
    made = engine()
    one = made.generate("river stone winter", max_new_tokens=5)
    many = made.generate(["river stone winter"], max_new_tokens=5)
    tokens = made.generate([TOKENIZER.encode("river stone winter")], max_new_tokens=5)
    assert one.token_ids == many[0].token_ids == tokens[0].token_ids
    assert one.text == TOKENIZER.decode(one.token_ids) and one.finish == "length"


def test_default_mode(model, bank, engine):
    assert engine().mode == "memory" and Engine(model).mode == "none"


def test_empty_bank(tmp_path, model, engine):
    """Memory mode with nothing to read is the model behind its prefix, and no error."""
    with make_bank(tmp_path / "b", model, []) as bank:
        for mode in ("memory", "rag"):
            run = engine(bank=bank, mode=mode).generate([prompt(70)], max_new_tokens=70, ignore_eos=True)[0]
            assert len(run.token_ids) == 70 and all(r.ids == [] for r in run.reads)
        no_refs = engine(refs=0).generate([prompt(70)], max_new_tokens=70, ignore_eos=True, collect_mass=True)[0]
        empty = engine(bank=bank).generate([prompt(70)], max_new_tokens=70, ignore_eos=True, collect_mass=True)[0]
        assert no_refs.token_ids == empty.token_ids
        assert [r.mass for r in no_refs.reads] == [[]] * 3


def test_fewer_references_than_refs(tmp_path, model, engine):
    with make_bank(tmp_path / "b", model, ["river stone", "winter market copper"]) as bank:
        run = engine(bank=bank, refs=5).generate([prompt(70)], max_new_tokens=70, ignore_eos=True, collect_mass=True)[0]
        assert [len(r.ids) for r in run.reads] == [2, 2, 2] and all(len(r.mass) == 2 for r in run.reads)
        two = engine(bank=bank, refs=2).generate([prompt(70)], max_new_tokens=70, ignore_eos=True)[0]
        assert two.token_ids == run.token_ids


def test_stats(engine, model):
    made = engine()
    stats = made.generate([prompt(100), prompt(30)], max_new_tokens=70, ignore_eos=True)[0].stats
    assert (stats.batch, stats.new_tokens, stats.steps, stats.retrievals) == (2, 140, 69, 5)
    assert stats.prompt_tokens == 132
    assert 0 < stats.ttft_s <= stats.total_s and stats.tokens_per_s == pytest.approx(140 / stats.total_s)
    assert {"embed", "search", "load", "prefill", "decode", "sample"} == set(stats.times)
    assert sum(stats.times.values()) <= stats.total_s
    config, memory = model.config, model.memory
    row = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    rows = 2 * (memory.prefix_len + 1 + 69) + 130
    record = 4 * 2 * len(memory.layers) * config.n_kv_heads * memory.tokens * config.head_dim
    assert stats.kv_bytes == (rows * row + 2 * 3 * record) // 2
    plain = engine(mode="none").generate([prompt(100)], max_new_tokens=70, ignore_eos=True)[0].stats
    assert plain.kv_bytes == (101 + 69) * row and plain.bytes_loaded == 0
    assert set(plain.times) == {"prefill", "decode", "sample"}


def test_to_dict_is_json(engine):
    import json

    run = engine().generate("river", max_new_tokens=3, collect_mass=True)
    back = json.loads(json.dumps(run.to_dict()))
    assert bytes.fromhex(back["reads"][0]["ids"][0]) == run.reads[0].ids[0]
    assert back["stats"]["tokens_per_s"] > 0 and back["text"] == run.text


def test_prompt_that_does_not_fit(engine, model):
    """Refused before anything is retrieved; with "slide" the oldest tokens fall out instead."""
    made = engine()
    with pytest.raises(ContextFull, match="max_context 768"):
        made.generate([prompt(900)], max_new_tokens=1)
    assert made.embedder.asked == []
    run = made.generate([prompt(900)], max_new_tokens=70, overflow="slide", ignore_eos=True)[0]
    assert len(run.token_ids) == 70 and run.finish == "length"
    assert [r.end for r in run.reads][-3:] == [900, 64, 70]
    plain = engine(mode="none").generate([prompt(900)], max_new_tokens=70, overflow="slide", ignore_eos=True)[0]
    assert len(plain.token_ids) == 70


def test_sliding_forgets_only_what_it_must(engine):
    """Two prompts with different beginnings and one ending: once the beginning fell out, they go on alike or nearly."""
    made = engine(mode="none")
    tail = prompt(760, "tail")
    a, b = (
        made.generate([prompt(600, seed) + tail], max_new_tokens=1, overflow="slide")[0].stats for seed in ("a", "b")
    )
    assert a.kv_bytes == b.kv_bytes <= 768 * 2 * 4 * 2 * 16 * 4


def test_rag_layout(engine, model, bank, monkeypatch):
    """Prefix, reference, ..., prefix, reference, BOS, prompt; the best reference last; one retrieval, no span."""
    seen = []
    prefill = model.net.prefill

    def watch(tokens, cu, cache, read, **kwargs):
        seen.append((tokens.tolist(), cache.prefix_len, cache.span, read))
        return prefill(tokens, cu, cache, read, **kwargs)

    monkeypatch.setattr(model.net, "prefill", watch)
    made = engine(mode="rag")
    ids = prompt(150)
    run = made.generate([ids], max_new_tokens=70, ignore_eos=True)[0]
    query = TOKENIZER.decode(ids[:64], skip_special=True)
    assert made.embedder.asked == [[query]] and run.stats.retrievals == 1
    hits, _ = bank.search(HashEmbedder().encode([query]), 3)
    front = [t for record in reversed(hits[0]) for t in (*MEMORY.prefix_ids, *bank.token_ids(record))]
    assert seen == [([*front, 1, *ids], 0, 0, None)]
    assert [(r.where, r.start, r.end, r.ids, r.query) for r in run.reads] == [("prompt", 0, 150, hits[0], query)]
    assert run.stats.prompt_tokens == len(front) + 151 and run.prompt_tokens == 150


def test_score_equals_a_loss_worked_out_step_by_step(engine, spy, model):
    """Feeding answers token by token, one sequence at a time, gives the same mean loss."""
    ids, answers = [prompt(90, "q"), prompt(10, "r")], [prompt(7, "a"), prompt(3, "b")]
    import torch

    from memory3.session import Session

    for mode in ("memory", "none"):
        made = engine(mode=mode)
        got = made.score(ids, answers)
        for one, answer, loss in zip(ids, answers, got, strict=True):
            with torch.inference_mode(), Session(made, 1, 200) as session:
                logits, total = session.feed([one], [(1,)]), 0.0
                for token in answer:
                    total -= float(logits.log_softmax(-1)[0, token])
                    logits = session.step(torch.tensor([token]))
            assert loss == pytest.approx(total / len(answer), rel=1e-4)


def test_scoring_beside_generating_changes_neither(engine):
    ids, answers = [prompt(90, "q"), prompt(10, "r")], [prompt(7, "a"), prompt(3, "b")]
    for mode in ("memory", "none", "rag"):
        made = engine(mode=mode)
        plain = made.generate(ids, max_new_tokens=6, ignore_eos=True)
        both = made.generate(ids, max_new_tokens=6, ignore_eos=True, score=answers)
        assert [g.token_ids for g in both] == [g.token_ids for g in plain]
        assert [g.loss for g in both] == pytest.approx(made.score(ids, answers), rel=1e-5)
        assert [g.loss for g in plain] == [None, None]
        assert both[0].stats.kv_bytes == plain[0].stats.kv_bytes
    with pytest.raises(ValueError, match="score: expected one text per prompt, 2, got 1"):
        made.generate(ids, score=answers[:1])


def test_score_refuses(engine):
    made = engine()
    with pytest.raises(ValueError, match="answers: expected one per prompt"):
        made.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="answer: expected some text"):
        made.score(["a"], [""])
    with pytest.raises(ContextFull):
        made.score(["a"], ["river " * 900])
