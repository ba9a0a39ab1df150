"""The real checkpoint and embedder: a small bank, three modes, a chat."""

import pytest

from memory3 import Embedder, Engine
from memory3.chat import Chat

from .common import make_bank

FACTS = [
    "The harbour of Velmora was founded in 1643 by the cartographer Idris Quell.",
    "Mount Tarrin is the highest mountain of Osweld and is 4,812 metres high.",
    "The opera The Glass Heron was written by the composer Maud Ellery in 1887.",
    "The river Sarn flows through the town of Brackwater and into the Lake of Mirrors.",
    "Zircon batteries were invented by the chemist Pell Andrade in a cellar in Kesh.",
    "The national dish of Lumeria is a soup of smoked plums called torvash.",
]


@pytest.fixture(scope="module")
def engines(smollm, tmp_path_factory):
    embedder = Embedder()
    with make_bank(tmp_path_factory.mktemp("smollm") / "b", smollm, [], embedder=embedder) as bank:
        bank.add(smollm.write(FACTS), embedder.encode(FACTS))
        yield {mode: Engine(smollm, bank, embedder, mode=mode) for mode in ("none", "memory", "rag")}


def test_finds_the_right_reference(engines):
    run = engines["memory"].generate("Question: Who wrote The Glass Heron?\nAnswer:", max_new_tokens=8)
    assert engines["memory"].bank.text(run.reads[0].ids[0]) == FACTS[2]
    assert len(run.reads[0].ids) == 5 and engines["memory"].arena.pinned == 0


def test_memory_and_text_tell_the_model_something(engines):
    """Loss of an answer that the model cannot know."""
    prompts = [f"Question: {q}\nAnswer:" for q in ("Who wrote The Glass Heron?", "How high is Mount Tarrin?")]
    answers = [" Maud Ellery", " 4,812 metres"]
    loss = {mode: sum(engine.score(prompts, answers)) / 2 for mode, engine in engines.items()}
    assert max(loss["rag"], loss["memory"]) < loss["none"] - 0.2, loss


def test_batch_equals_one_by_one(engines):
    prompts = ["The harbour of Velmora was", "Once upon a time there was a king who", "Lumeria is known for its"]
    engine = engines["memory"]
    together = engine.generate(prompts, max_new_tokens=6)
    # bf16: a near-tie may fall the other way in a batch of another size, so only the first token must agree.
    for one, b in zip(prompts, together, strict=True):
        assert engine.generate(one, max_new_tokens=1).token_ids == b.token_ids[:1]


def test_chat(engines):
    chat = Chat(engines["memory"])
    answer = chat.send("Who founded the harbour of Velmora?", max_new_tokens=12)
    assert engines["memory"].bank.text(answer.reads[0].ids[0]) == FACTS[0] and answer.text.strip()
    again = chat.send("And in which year did that happen? Answer with a number only.", max_new_tokens=6)
    assert again.stats.prompt_tokens < 40
    chat.close()
