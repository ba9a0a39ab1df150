"""Adapters: start at nothing, train, come back from a file, merge into the same function."""

from __future__ import annotations

import pytest
import torch
from model.common import tiny

from memory3.train.batch import make_batch
from memory3.train.config import LoRA
from memory3.train.lora import add_lora, lora_state, merge, read_adapter, save_adapter
from memory3.train.objective import Objective

from .common import memory_samples, reference_tokens

SMALL = LoRA(rank=3, alpha=6.0)


def stirred():
    net = add_lora(tiny(), SMALL)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return net


def loss(net) -> torch.Tensor:
    return Objective(net, reference_tokens)(make_batch(memory_samples()))


def test_only_the_adapter_trains_and_it_starts_at_nothing():
    net = add_lora(tiny(), SMALL)
    assert loss(net).item() == pytest.approx(loss(tiny()).item(), rel=1e-6)
    loss(net).backward()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == trained
    assert sum("lora_A" in n for n in trained) == 4 * 4


def test_saved_and_merged_it_is_the_same_function(tmp_path):
    net = stirred()
    save_adapter(tmp_path, lora_state(net), SMALL, {"base": "tiny"}, torch.float32)
    state, about = read_adapter(tmp_path)
    assert about["base"] == "tiny" and about["rank"] == 3 and set(about["targets"]) == set(SMALL.targets)
    merged = merge(tiny(), state, about["alpha"] / about["rank"])
    assert loss(merged).item() == pytest.approx(loss(net).item(), rel=1e-5)
    assert abs(loss(merged).item() - loss(tiny()).item()) > 0.1


def test_bad_adapters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        read_adapter(tmp_path)
    state = lora_state(stirred())
    name = next(iter(state)).removesuffix(".lora_A").removesuffix(".lora_B")
    state[f"{name}.lora_A"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="does not fit"):
        merge(tiny(), state, 1.0)
    with pytest.raises(ValueError, match="targets"):
        LoRA(targets=("embed",))
