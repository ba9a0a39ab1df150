"""The adapter that comes with SmolLM2-135M: what its card says holds on a few questions about held-out titles."""

from __future__ import annotations

import json

import pytest
import torch

from memory3 import data
from memory3.bank.corpus import pack
from memory3.demo.questions import fact_question, sentence_question
from memory3.eval.answer import Answerer
from memory3.eval.writing import Writer
from memory3.model.adapted import SHIPPED, adapter_folder
from memory3.model.load import load_model
from memory3.train.batch import Piece, Sample
from memory3.train.holdout import in_split
from memory3.train.lora import ABOUT

if data.missing():
    pytest.skip(f"demo packages are not installed: {data.install_command()}", allow_module_level=True)

QUESTIONS, REFS = 12, 5


@pytest.fixture(scope="module")
def models():
    adapted = load_model("smollm2-135m", torch.bfloat16, weights="dense", adapter=SHIPPED)
    return adapted, load_model("smollm2-135m", torch.bfloat16, adapted.memory, weights="dense")


def slice_losses(model, writer_net) -> dict[str, float]:
    """Nats per answer token with nothing to read, and with the question's reference among five neighbours."""
    encode, span = model.tokenizer.encode_reference, model.memory.span
    chunks, asked = [], []
    for source, entries in (("wiki", data.wiki()), ("factbook", data.factbook())):
        count = 0
        for entry in in_split(entries, "test"):
            chunk = pack(entry, encode, span)[0]
            made = (
                fact_question(chunk.text, 0) if source == "factbook" else sentence_question(chunk.title, chunk.text, 0)
            )
            if made is not None and count < QUESTIONS // 2:
                asked.append((len(chunks), made))
                chunks.append(chunk)
                count += 1
    among = [c.token_ids for c in chunks]
    write, answerer = Writer(writer_net, among), Answerer(model.net, model.tokenizer)
    opening, out = model.memory.context_bos_ids, {}
    for read in ("none", "memory"):
        samples = []
        for gold, made in asked:
            prompt, answer = (model.tokenizer.encode(t) for t in (made.prompt, " " + made.answer))
            ids = (*opening, *prompt, *answer)
            reads = tuple((gold + 2 * i) % len(chunks) for i in range(REFS))
            samples.append(Sample(ids, len(ids) - len(answer), (Piece(len(ids), reads),) if read == "memory" else ()))
        losses = answerer.losses(samples, write(range(len(chunks))) if read == "memory" else None)
        out[read] = sum(losses) / sum(len(s.ids) - s.first for s in samples)
    return out


def test_the_published_number_holds(models):
    """As recorded in adapter_config.json, in bfloat16 on AVX-512. Other roundings keep other tokens:
    float32 gives 0.322 for `memory`, bfloat16 on AVX2 0.319, on AVX-512 0.288."""
    adapted, original = models
    about = json.loads((adapter_folder(SHIPPED, "smollm2-135m") / ABOUT).read_text())
    before, after = slice_losses(original, original.net), slice_losses(adapted, original.net)
    assert after["memory"] < before["memory"] < before["none"]
    for read, want in about["slice"].items():
        assert after[read] == pytest.approx(want, rel=0.15 if read == "memory" else 0.02), read


def test_it_reads_banks_of_the_checkpoint(models):
    adapted, original = models
    assert adapted.model_hash == original.model_hash and adapted.identity() == original.identity()
    ids = [[5, 6, 7, 8, 9, 10]]
    assert torch.equal(adapted.write_ids(ids)[0].kv, original.write_ids(ids)[0].kv)
