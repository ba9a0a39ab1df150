"""What training leaves behind is what `load_model` and transformers read."""

from __future__ import annotations

import pytest
import torch
from model.common import TINY_MEMORY, cu, tiny

from memory3 import load_model
from memory3.train.export import save_model
from memory3.train.tokenizer import train_tokenizer

TEXTS = ["The river runs to the sea, 1234 miles.", "Stones in the river: the sea takes them."]


def test_a_saved_model_comes_back(tmp_path):
    """Weights, vocabulary, special tokens and memory configuration; logits equal to the last bit."""
    tokenizer = train_tokenizer(TEXTS, 300)
    net = tiny()
    save_model(tmp_path, net, tokenizer, torch.float32)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.memory == TINY_MEMORY and loaded.config == net.config
    assert loaded.tokenizer.hash == tokenizer.hash and loaded.tokenizer.bos_id == 1 and loaded.tokenizer.eos_ids == (0,)
    tokens = torch.arange(2, 30)
    torch.testing.assert_close(loaded.net(tokens, cu(12, 16)), net(tokens, cu(12, 16)), rtol=0, atol=0)


def test_transformers_computes_the_same(tmp_path):
    from transformers import LlamaForCausalLM

    net = tiny(memory=None)
    save_model(tmp_path, net, train_tokenizer(TEXTS, 300), torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits[0], net(tokens, cu(28)), rtol=1e-4, atol=1e-4)


def test_vocabulary_knows_any_text_and_splits_digits():
    tokenizer = train_tokenizer(TEXTS, 300)
    text = "sea 1234 \u00fc\u4e2d\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4 and tokenizer.vocab_size <= 300
    with pytest.raises(ValueError, match="258"):
        train_tokenizer(TEXTS, 100)
