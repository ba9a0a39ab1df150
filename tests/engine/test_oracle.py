"""Whole runs against the dense oracle: every prompt and generated position, fp32, 1e-4."""

from dataclasses import replace

import pytest
import torch

from memory3 import Engine

from .common import CONFIG, MEMORY, TOKENIZER, HashEmbedder, make_bank, make_model, prompt
from .oracle import Retriever, logits_of, rms, rotate, schedule

CASES = {
    "plain heads": {},
    "head map": {"head_map": ((0, -1), (-1, 0), (0, -1))},
    "head map, two heads swapped": {"head_map": ((1, 0), (0, 1), (1, 0))},
    "causal rule, all layers": {"rule": "causal", "layers": (0, 1, 2, 3)},
    "exp rule, chunks of 16": {"rule": "exp", "chunk": 16, "min_query": 5, "tokens": 7},
}


def with_bias(memory, i):
    if i % 3:
        generator = torch.Generator().manual_seed(i)
        memory.bias = torch.randn(memory.pos.shape, generator=generator)
        memory.bias[..., 0] = -torch.inf if i % 5 == 0 else 1.0


def close(actual, expected):
    """Every row within 1e-4, relative to the row."""
    assert actual.shape == expected.shape
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-4, error.max()


def check_run(model, bank, passes, run, prompt_ids, refs):
    """`passes`: the logits seen while `run` was generated for this prompt alone."""
    retriever = Retriever(bank, HashEmbedder())
    fed = run.token_ids[:-1]  # the last token is never fed
    queries = schedule(prompt_ids, fed, TOKENIZER, model.memory)
    sets = [[retriever.memories[i] for i in retriever(q, refs)] for q in queries]
    want = logits_of(model, [1, *prompt_ids, *fed], sets)[len(prompt_ids) :]
    got = torch.cat([logits for _, logits in passes])
    close(got, want)
    assert run.token_ids == want.argmax(-1).tolist()
    plain = logits_of(model, [1, *prompt_ids, *fed], None)[len(prompt_ids) :]
    assert (plain - want).abs().max() > 0.1, "memory must matter, or the test shows nothing"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_run_equals_oracle(case, bias, tmp_path, spy):
    model = make_model(replace(MEMORY, **CASES[case]))
    with make_bank(tmp_path / "b", model, change=with_bias if bias else None) as bank:
        assert bank.has_bias == bias
        engine = Engine(model, bank, HashEmbedder(), slots=40)
        passes = spy(model)
        ids = prompt(150, "long")
        run = engine.generate([ids], max_new_tokens=70, ignore_eos=True)[0]
        assert [kind for kind, _ in passes].count("prefill") == 1
        check_run(model, bank, passes, run, ids, refs=3)


def test_every_prompt_row_equals_oracle(model, bank, engine):
    """score() reads the logits of the answer's rows, too."""
    ids, answer = prompt(90), prompt(9, "answer")
    retriever = Retriever(bank, HashEmbedder())
    queries = schedule(ids, [], TOKENIZER, MEMORY)
    sets = [[retriever.memories[i] for i in retriever(q, 3)] for q in queries + queries[-1:] * len(answer)]
    logits = logits_of(model, [1, *ids, *answer], sets)
    rows = logits[len(ids) : -1].log_softmax(-1)
    want = -rows.gather(1, torch.tensor(answer)[:, None]).mean()
    assert engine().score([ids], [answer])[0] == pytest.approx(float(want), abs=1e-4)


def test_plain_mode_is_the_plain_model(model, engine, spy):
    passes = spy(model)
    ids = prompt(70)
    run = engine(mode="none").generate([ids], max_new_tokens=20, ignore_eos=True)[0]
    want = logits_of(model, [1, *ids, *run.token_ids[:-1]], None)[len(ids) :]
    close(torch.cat([logits for _, logits in passes]), want)
    assert run.token_ids == want.argmax(-1).tolist()
    assert run.reads == [] and run.stats.retrievals == 0


def test_mass_is_the_share_of_attention_on_memory(tmp_path):
    """With one memory layer, the first, the shares follow from embeddings alone."""
    shallow = make_model(replace(MEMORY, layers=(0,)))
    net, config, ids = shallow.net, CONFIG, prompt(40)
    with make_bank(tmp_path / "b", shallow) as bank:
        run = Engine(shallow, bank, HashEmbedder()).generate([ids], max_new_tokens=2, collect_mass=True)[0]
        retriever = Retriever(bank, HashEmbedder())
    hits = retriever(TOKENIZER.decode(ids, skip_special=True), 3)
    assert run.reads[0].ids == hits and run.reads[0].mass_rows == len(ids) + 1
    m, rows = MEMORY.prefix_len, len(ids) + 1
    x = net.embed[torch.tensor([*MEMORY.prefix_ids, 1, *ids])]
    block = net.blocks[0]
    qkv = (rms(x, block.attn_norm.weight, config.norm_eps) @ block.qkv.weight.T).view(m + rows, -1, config.head_dim)
    positions = torch.arange(m + rows)
    positions[m:] += MEMORY.span
    q, k = rotate(qkv[:, :4], positions, config.rope_base), rotate(qkv[:, 4:6], positions, config.rope_base)
    shares = torch.zeros(3)
    for head in range(4):
        kept = [retriever.memories[i] for i in hits]
        keys = [one.kv[0, 0, head // 2, : one.n_valid] for one in kept]
        score = q[:, head] @ torch.cat([*keys, k[:, head // 2]]).T / config.head_dim**0.5
        n = sum(map(len, keys))
        score[:, n:].masked_fill_(~torch.ones(m + rows, m + rows).tril().bool(), -torch.inf)
        weight = score.softmax(-1)[m:, :n].split([len(key) for key in keys], -1)
        shares += torch.stack([w.sum(-1).mean() for w in weight]) / 4
    assert run.reads[0].mass == pytest.approx(shares.tolist(), abs=1e-5)
    assert 0 < sum(run.reads[1].mass) < 1 and run.reads[1].mass_rows == 1
