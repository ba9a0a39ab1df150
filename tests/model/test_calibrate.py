"""Calibration: the loss it reports is the model's, the budget holds, and memory that helps is found."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from memory3 import MemoryModel, MemoryRead
from memory3.calibrate import Sample, calibrate, default_bands, samples_from_texts

from .common import TINY_MEMORY, cu, random_ids, tiny


class Words:
    """A tokenizer of numbers: enough for calibration, which only encodes references."""

    hash = "words"

    def encode_reference(self, text):
        return [int(word) for word in text.split()]


@pytest.fixture
def model():
    return MemoryModel(tiny(), Words(), "tiny")


def samples(count=5):
    g = torch.Generator().manual_seed(11)
    return [Sample(*random_ids(g, 4, 6, 12)) for _ in range(count)]


def test_losses_are_those_of_the_model(model):
    given = samples()
    result = calibrate(model, given, bands={"low": (0, 1), "all": range(4)}, tokens=(2, 4))
    assert [(c.band, c.tokens) for c in result.table] == [("low", 2), ("all", 2), ("low", 4), ("all", 4)]
    assert result.samples == 5 and result.answer_tokens == 30
    # Every sample reads all five references: written and read here by hand.
    memory = dataclasses.replace(TINY_MEMORY, layers=(0, 1), tokens=4)
    net = model.net.with_memory(memory)
    by_hand = MemoryModel(net, Words(), "tiny")
    kv = torch.stack([m.kv for m in by_hand.write_ids([s.reference for s in given])])
    losses = []
    for sample in given:
        ids = [1, *sample.prompt, *sample.answer]
        read = MemoryRead(
            kv, torch.full((5,), 4, dtype=torch.int32), torch.arange(5, dtype=torch.int32)[None], cu(len(ids))
        )
        logits = net(torch.tensor(ids), cu(len(ids)), read, by_hand.prefix)
        losses.append(F.cross_entropy(logits[4:-1], torch.tensor(sample.answer)))
    assert result.table[2].nll == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    plain = [
        F.cross_entropy(net(torch.tensor([1, *s.prompt, *s.answer]), cu(11))[4:-1], torch.tensor(s.answer))
        for s in given
    ]
    assert result.nll_without == pytest.approx(float(torch.stack(plain).mean()), rel=1e-4)
    assert model.net.memory is TINY_MEMORY  # the model itself is as it was


def test_best_is_the_least_loss_within_the_budget(model):
    seen = []
    free = calibrate(model, samples(), tokens=(2, 4), progress=lambda *args: seen.append(args))
    assert free.best.nll == min(c.nll for c in free.table)
    assert [done for done, _, _ in seen] == list(range(1, 11)) and all(total == 10 for _, total, _ in seen)
    size = {c.tokens: c.bytes for c in free.table if c.band == "first half"}
    assert size[4] == 2 * 2 * 2 * 4 * 16 * 4 == 2 * size[2]
    tight = calibrate(model, samples(), tokens=(2, 4), byte_budget=size[2])
    assert tight.best.bytes <= size[2]
    assert tight.best.nll == min(c.nll for c in tight.table if c.bytes <= size[2])
    chosen = tight.memory(TINY_MEMORY)
    assert chosen.layers == tight.best.layers and chosen.tokens == 2 and chosen.prefix_ids == TINY_MEMORY.prefix_ids
    with pytest.raises(ValueError, match="byte_budget=10 is below the smallest candidate"):
        calibrate(model, samples(), tokens=(2,), byte_budget=10)


def test_same_seed_same_result(model):
    assert calibrate(model, samples(), tokens=(2,), seed=3) == calibrate(model, samples(), tokens=(2,), seed=3)


def test_bands_of_the_paper_and_its_remark():
    assert default_bands(44)["first half"] == tuple(range(22))
    assert default_bands(44)["middle"] == tuple(range(11, 33))
    assert default_bands(30)["last half"] == tuple(range(15, 30)) and len(default_bands(1)) == 4


def test_samples_are_passages_of_their_reference():
    memory = dataclasses.replace(TINY_MEMORY, span=64, tokens=4)
    model = MemoryModel(tiny(memory=memory), Words(), "tiny")
    texts = [" ".join(map(str, range(i, i + n))) for i, n in ((0, 50), (10, 30), (20, 70))]
    drawn = samples_from_texts(model, texts, seed=1)
    assert len(drawn) == 2
    for sample in drawn:
        assert len(sample.prompt) == 12 and len(sample.answer) == 24 and len(sample.reference) <= 64
        passage = sample.prompt + sample.answer
        start = sample.reference.index(passage[0])
        assert sample.reference[start : start + 36] == passage
    assert samples_from_texts(model, texts, seed=1) == drawn
    with pytest.raises(ValueError, match="no text has 40 tokens"):
        samples_from_texts(model, texts[1:2])
