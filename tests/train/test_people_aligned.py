"""References of one length are written as memory3.write writes them."""

from __future__ import annotations

import pytest
import torch

from memory3.config import MemoryConfig
from memory3.model.llama import Llama
from memory3.train.aligned import AlignedObjective, FrozenAligned
from memory3.train.batch import make_batch
from memory3.train.invented import Invented, Statements, tokens
from memory3.train.objective import Objective
from memory3.train.people import SIZES

SMALL = SIZES["cpu"].but(["syllables=16", "group=32", "dim=16", "heads=2", "kv_heads=2", "head_dim=8"])
PEOPLE = Invented(syllables=16, group=32)


@pytest.mark.parametrize("rule", ["received", "causal"])
def test_as_any_references(rule):
    memory = MemoryConfig(layers=(0, 1), tokens=5, span=32, rule=rule)
    net = Llama(SMALL.shape, memory).init_weights(0, std=0.2).requires_grad_(True)
    batch = make_batch(Statements(PEOPLE, "memory", "memory", 0, 8, 0).samples(0))
    found = []
    for objective in (Objective(net, tokens), AlignedObjective(net, tokens, PEOPLE.length)):
        net.zero_grad()
        loss = objective(objective.pack(batch))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_prefixes_are_refused():
    net = Llama(SMALL.shape, MemoryConfig(layers=(0,), prefix_ids=(1,)))
    with pytest.raises(ValueError, match="prefix_ids: expected none"):
        AlignedObjective(net, tokens, PEOPLE.length)


def test_frozen_writing_keeps_the_weights_of_the_first_reading(tmp_path):
    net = Llama(SMALL.shape, SMALL.memory).init_weights(0, std=0.2).requires_grad_(True)
    file = tmp_path / "writer.safetensors"
    frozen = FrozenAligned(net, tokens, PEOPLE.length, file=file)
    live = AlignedObjective(net, tokens, PEOPLE.length)
    pack = live.pack(make_batch(Statements(PEOPLE, "memory", "memory", 0, 8, 0).samples(0)))
    before, _ = live._memories(pack.reads)
    net.eval()
    assert frozen._memories(pack.reads)[0].requires_grad and not file.exists()  # an evaluation decides nothing
    net.train()
    torch.testing.assert_close(frozen._memories(pack.reads)[0], before)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    resumed = FrozenAligned(net, tokens, PEOPLE.length, file=file)
    for objective in (frozen, resumed):
        written, _ = objective._memories(pack.reads)
        assert not written.requires_grad
        torch.testing.assert_close(written, before)
    assert not torch.allclose(live._memories(pack.reads)[0], before)
    assert len(list(frozen.parameters())) == len(list(live.parameters()))
