"""A tiny model with a byte-level tokenizer, an embedder that hashes, and banks of made-up references."""

from __future__ import annotations

import random
import zlib

import numpy as np
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from memory3 import Bank, MemoryConfig, ModelConfig
from memory3.model.llama import Llama
from memory3.model.load import MemoryModel
from memory3.model.tokenizer import Tokenizer

WORDS = (
    "river stone winter market copper engine garden letter captain bridge violin harbour lantern meadow thunder "
    "window falcon orchard silver cotton desert anchor candle forest pepper mirror saddle tunnel island rocket"
).split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = ModelConfig(
    vocab_size=320, dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, rope_base=1000.0,
    max_context=768, tied=False,
)  # fmt: skip


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: two special tokens, 256 bytes, a few merges; knows any text."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=["<|im_end|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    raw.train_from_iterator([" ".join(WORDS)] * 2 + ["Reference:"] * 4, trainer)
    return Tokenizer(raw, chat_template=TEMPLATE, bos_id=1, eos_ids=(0,))


TOKENIZER = make_tokenizer()
MEMORY = MemoryConfig(
    layers=(0, 1, 3), tokens=4, refs=3, rule="received",
    prefix_ids=(1, *TOKENIZER.encode("Reference:")), context_bos_ids=(1,),
)  # fmt: skip


def make_model(memory: MemoryConfig = MEMORY, config: ModelConfig = CONFIG, seed: int = 0) -> MemoryModel:
    """Random weights large enough that attention is far from uniform, and memory matters."""
    net = Llama(config, memory).init_weights(seed, std=0.2).requires_grad_(False)
    return MemoryModel(net, TOKENIZER, f"tiny-{seed}")


class HashEmbedder:
    """Trigrams of bytes, hashed into 96 buckets and normalised. Remembers what it was asked."""

    def __init__(self, name: str = "hash") -> None:
        self.name, self.asked = name, []

    def vector(self, text: str) -> np.ndarray:
        raw = f"  {text}  ".encode()
        out = np.zeros(96, np.float32)
        for i in range(len(raw) - 2):
            out[zlib.crc32(raw[i : i + 3]) % 96] += 1
        return out / np.linalg.norm(out)

    def encode(self, texts):
        self.asked.append(list(texts))
        return np.stack([self.vector(t) for t in texts])


def words(count: int, seed: int | str) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def reference_texts(count: int) -> list[str]:
    """Different lengths, from shorter than K tokens to the full span."""
    return [words(1 + (7 * i) % 25, f"reference {i}") for i in range(count)]


def make_bank(path, model: MemoryModel, texts=None, *, cold=False, change=None, embedder=None) -> Bank:
    """A bank open for writing; `change(memory, i)` may edit a memory before it is stored."""
    texts = reference_texts(40) if texts is None else texts
    embedder = embedder or HashEmbedder()
    bank = Bank.create(path, model.identity(embedder=embedder.name))
    tokens = [TOKENIZER.encode_reference(t)[: model.memory.span] for t in texts]
    vectors = np.stack([embedder.vector(t) for t in texts]) if texts else None
    if texts and cold:
        bank.add_cold(texts, tokens, vectors)
    elif texts:
        memories = model.write_ids(tokens, texts)
        for i, memory in enumerate(memories if change else ()):
            change(memory, i)
        bank.add(memories, vectors)
    return bank


def prompt(tokens: int, seed: int | str = 0) -> list[int]:
    """Exactly so many token ids of words."""
    return TOKENIZER.encode(words(tokens, seed))[:tokens]
