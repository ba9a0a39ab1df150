"""References and prompts of exact length, cut from one stream of the wiki corpus and the factbook; a bank of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from memory3 import Bank, data
from memory3.model.load import MemoryModel

MODEL = "smollm2-135m"
APART = 32  # windows of the corpus from one prompt to the next


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """--memory-tokens and --memory-layers, for `load`."""
    parser.add_argument(
        "--memory-tokens", type=int, metavar="K", help="memory tokens per head and reference (default: the model's)"
    )
    parser.add_argument(
        "--memory-layers",
        metavar="LAYERS",
        help="layers with memories, as 15-29 or 3,7,10-12 (default: the model's)",
    )


def load(args: argparse.Namespace, weights: str, load_model=None) -> MemoryModel:
    """SmolLM2-135M with the memory format of the arguments."""
    from memory3 import load_model as default
    from memory3.config import PRESETS, layer_list

    memory = PRESETS[MODEL].memory
    if args.memory_tokens is not None:
        memory = replace(memory, tokens=args.memory_tokens)
    if args.memory_layers is not None:
        memory = replace(memory, layers=layer_list(args.memory_layers))
    return (load_model or default)(MODEL, weights=weights, memory=memory)


def default_folder(references: int, model: MemoryModel) -> Path:
    """In the user's cache folder; another model or memory configuration has another bank."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "memory3" / f"bench-{references}-{model.identity().record_id([]).hex()[:12]}"


def windows(model: MemoryModel, tokens: int) -> Iterator[list[int]]:
    """Runs of exactly `tokens` token ids, the corpus joined end to end."""
    stream: list[int] = []
    for entry in chain(data.wiki(), data.factbook()):
        stream += model.tokenizer.encode(" " + entry.text)
        while len(stream) >= tokens:
            yield stream[:tokens]
            del stream[:tokens]


def prompts(model: MemoryModel, count: int, tokens: int, after: int) -> list[list[int]]:
    """Prompts from behind the first `after` references of the corpus (text the bank does not hold), far apart: the
    requests of a batch have little to do with each other.
    """
    skip = -(-after * model.memory.span // tokens)
    found = list(islice(windows(model, tokens), skip, skip + count * APART, APART))
    if len(found) < count:
        raise ValueError(f"after: the corpus ends before {count} prompts of {tokens} tokens behind {after} references")
    return found


def open_bank(folder: Path, model: MemoryModel, embedder, references: int, progress=None) -> Bank:
    """A bank of at least so many references of `span` tokens, open for writing; goes on where a stopped writing ended.

    Only texts and embeddings are written here. A memory is written when it is first retrieved, and is then there for
    good: the untimed runs before a measurement write all that it needs. progress(done, total) after each batch.
    """
    identity = model.identity(embedder=embedder.name)
    there = (folder / "data.mdb").is_file()
    bank = Bank.open(folder, identity, write=True) if there else Bank.create(folder, identity)
    if len(bank) >= references:
        return bank
    try:
        wanted = windows(model, model.memory.span)
        done = 0
        while done < references:
            part = list(islice(wanted, min(32, references - done)))
            if not part:
                raise ValueError(f"references: the corpus has {done} pieces of {model.memory.span} tokens")
            new = [ids for ids in part if not bank.has(bank.record_id(ids))]
            if new:
                texts = [model.tokenizer.decode(ids) for ids in new]
                bank.add_cold(texts, new, embedder.encode(texts))
            done += len(part)
            if progress is not None:
                progress(done, references)
        bank.build_index()
    except BaseException:
        bank.close()
        raise
    return bank
