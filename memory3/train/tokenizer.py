"""A vocabulary for a model that starts from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..model.tokenizer import Tokenizer

END, START = "<|im_end|>", "<|im_start|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens: the end token (0), the start token (1), 256 bytes, merges of `texts`.

    Raises ValueError for fewer than 258 tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size: expected at least 258 (256 bytes, start and end), got {vocab_size}")
    raw = RawTokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return Tokenizer(raw, bos_id=1, eos_ids=(0,))
