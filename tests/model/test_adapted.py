"""A checkpoint with an adapter: the same function as merged weights, and memories written by the right weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memory3 import load_model
from memory3.train.config import LoRA
from memory3.train.export import save_model
from memory3.train.lora import WEIGHTS, add_lora, lora_state, merge, save_adapter
from memory3.train.tokenizer import train_tokenizer
from memory3_kernels import mxint8_pays

from .common import cu, tiny

SMALL = LoRA(rank=3, alpha=6.0)
TEXTS = ["The river runs to the sea, 1234 miles.", "Stones in the river: the sea takes them."]
TOKENS = torch.arange(2, 30)


@pytest.fixture
def saved(tmp_path):
    """(folder of a checkpoint, function of an `about` that writes an adapter of it)."""
    save_model(tmp_path / "model", tiny(), train_tokenizer(TEXTS, 300), torch.float32)
    net = add_lora(tiny(), SMALL)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))

    def adapter(name: str = "adapter", **about):
        folder = tmp_path / name
        save_adapter(folder, lora_state(net), SMALL, about, torch.float32)
        return folder

    return tmp_path / "model", adapter, lora_state(net)


def test_it_is_the_function_of_merged_weights(saved):
    folder, adapter, state = saved
    model = load_model(folder, torch.float32, adapter=adapter(write="frozen", memory={"tokens": 2}))
    merged = merge(tiny(), state, SMALL.alpha / SMALL.rank)
    torch.testing.assert_close(model.net(TOKENS, cu(12, 16)), merged(TOKENS, cu(12, 16)), rtol=1e-5, atol=1e-5)
    assert model.memory == dataclasses.replace(tiny().memory, tokens=2) == model.writer.memory


@pytest.mark.parametrize("write", ["frozen", "live"])
def test_who_writes(saved, write):
    """Frozen: the checkpoint, whose banks serve on. Live: the adapted weights, under an identity of their own."""
    folder, adapter, _ = saved
    plain = load_model(folder, torch.float32)
    model = load_model(folder, torch.float32, adapter=adapter(write=write))
    ids = [list(range(2, 12))]
    same = torch.equal(model.write_ids(ids)[0].kv, plain.write_ids(ids)[0].kv)
    assert same == (write == "frozen") == (model.model_hash == plain.model_hash)
    wider = model.with_memory(dataclasses.replace(model.memory, layers=(0, 2)))
    assert torch.equal(wider.write_ids(ids)[0].kv[0], model.write_ids(ids)[0].kv[0])


def test_low_bit_weights_take_an_adapter(saved):
    folder, adapter, _ = saved
    path = adapter(write="frozen")
    dense = load_model(folder, torch.float32, adapter=path)
    packed = load_model(folder, torch.bfloat16, weights="q8_0", adapter=path)
    want, got = dense.net(TOKENS, cu(28)), packed.net(TOKENS, cu(28))
    assert (want - got).norm() / want.norm() < (0.1 if mxint8_pays() else 0.05)


def test_bad_adapters_are_named(saved, tmp_path):
    folder, adapter, _ = saved
    with pytest.raises(ValueError, match="adapts the checkpoint"):
        load_model(folder, adapter=adapter(base_hash="of another"))
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_model(folder, adapter=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no adapter comes with"):
        load_model(folder, adapter="shipped")
