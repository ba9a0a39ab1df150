"""lm-evaluation-harness runs a tiny model with and without memory, and gets the numbers of plain calls."""

from __future__ import annotations

import pytest
import torch
from engine.common import HashEmbedder, make_model, words

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from memory3 import Bank  # noqa: E402
from memory3.eval import harness  # noqa: E402

MODEL = make_model()
TEXTS = [words(8, i) for i in range(30)]


@pytest.fixture
def bank(tmp_path):
    embedder = HashEmbedder()
    tokens = [MODEL.tokenizer.encode_reference(t) for t in TEXTS]
    with Bank.create(tmp_path / "bank", MODEL.identity(embedder=embedder.name)) as bank:
        bank.add_cold(TEXTS, tokens, embedder.encode(TEXTS))
    return tmp_path / "bank"


class Request:
    def __init__(self, *args):
        self.args = args


def test_log_likelihoods(bank):
    """Those of a plain call; greedy where the model's own continuation is asked for; memory changes them."""
    lm = harness.Memory3LM(model=MODEL)
    prompt = TEXTS[3]
    ids = MODEL.prompt_ids(prompt)
    answer = MODEL.tokenizer.encode(" river stone")
    cu = torch.tensor([0, len(ids) + len(answer)], dtype=torch.int32)
    logits = MODEL.net(torch.tensor(ids + answer), cu)[len(ids) - 1 : -1]
    want = float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum())
    first = int(MODEL.net(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))[-1].argmax())
    got = lm.loglikelihood([Request(prompt, " river stone")], disable_tqdm=True)
    assert got[0][0] == pytest.approx(want, rel=1e-4)
    ((_, greedy),) = lm._loglikelihood_tokens([((prompt, "?"), MODEL.tokenizer.encode(prompt), [first])])
    assert greedy

    with_memory = harness.Memory3LM(model=MODEL, bank=str(bank), embedder=HashEmbedder())
    assert with_memory.loglikelihood([Request(prompt, " river stone")], disable_tqdm=True)[0][0] != pytest.approx(want)
    (rolling,) = lm.loglikelihood_rolling([Request(TEXTS[5])])
    text = MODEL.tokenizer.encode(TEXTS[5])
    every = MODEL.net(torch.tensor([1, *text]), torch.tensor([0, len(text) + 1], dtype=torch.int32))[:-1]
    assert rolling == pytest.approx(float(torch.log_softmax(every, -1)[range(len(text)), text].sum()), rel=1e-4)


def test_a_question_retrieves_once_and_without_its_options(bank):
    embedder = HashEmbedder()
    lm = harness.Memory3LM(model=MODEL, bank=str(bank), embedder=embedder, refs=2)
    examples = "Question: what?\nAnswer: that\n\nQuestion: who?\nAnswer: she\n\n"
    context = f"{examples}Question: {TEXTS[7]}\nAnswer:"
    lm.loglikelihood([Request(context, f" {word}") for word in ("river", "stone", "winter")], disable_tqdm=True)
    assert embedder.asked == [[f"Question: {TEXTS[7]}\nAnswer:"]]
    reads = lm._found[context]
    with Bank.open(bank) as plain:
        assert len(reads) == 2 and plain.text(reads[0]) == TEXTS[7]


def test_generation_stops_where_it_is_told(bank):
    lm = harness.Memory3LM(model=MODEL)
    free = lm.generate_until([Request("river stone", {"until": ["\0"], "max_gen_toks": 12})])[0]
    want = MODEL.generate("river stone", max_new_tokens=12).lstrip("\n").strip()
    assert free == want and len(free) > 3
    stop = free[2]
    assert lm.generate_until([Request("river stone", {"until": [stop], "max_gen_toks": 12})])[0] == free[:2].strip()


def test_a_whole_task(bank, monkeypatch):
    rows = [
        {"question": f"{TEXTS[i]}", "correct_answer": "river", "distractor1": "stone", "distractor2": "gold",
         "distractor3": "winter", "support": ""}
        for i in range(6)
    ]  # fmt: skip
    monkeypatch.setattr(harness.sources, "arrow_rows", lambda folder: rows)
    with_memory = harness.Memory3LM(model=MODEL, bank=str(bank), embedder=HashEmbedder())
    for lm in (harness.Memory3LM(model=MODEL), with_memory):
        found = harness.run(["sciq"], lm, limit=5)["memory3_sciq"]
        prompts = [f"Question: {r['question']}\nAnswer:" for r in rows[:5]]
        right = 0
        for prompt in prompts:
            options = [f" {w}" for w in ("river", "stone", "gold", "winter")]
            scores = [s for s, _ in lm.loglikelihood([Request(prompt, o) for o in options], disable_tqdm=True)]
            right += scores.index(max(scores)) == 0
        assert found["acc,none"] == pytest.approx(right / 5)
    with pytest.raises(ValueError, match="tasks"):
        harness.tasks(["mmlu"])
