"""Weights for an evaluation: the checkpoint, its adapter, and adapters that were trained equally long as rivals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..bank.codec import Codec
from ..identity import hash_files
from ..model.adapted import adapter_folder
from ..model.load import MemoryModel, load_model
from ..model.tokenizer import Tokenizer
from ..train.lora import WEIGHTS
from .run import Reader

BOOKS = "codebooks.bin"


def load_readers(
    source: str | Path, adapter: str | None, *, closed_book: Path | None = None, text_reader: Path | None = None
) -> tuple[dict[str, Reader], Tokenizer]:
    """Readers by name: "original", and "adapted", "closed book", "reader of text" where adapters are given.

    adapter: a folder, "shipped", or None ("none"). All of them have the adapter's memory configuration.
    """
    folders = {
        "adapted": None if adapter in (None, "none") else adapter_folder(adapter, source),
        "closed book": closed_book,
        "reader of text": text_reader,
    }
    loaded: dict[str, MemoryModel] = {
        name: load_model(source, torch.bfloat16, weights="dense", adapter=folder)
        for name, folder in folders.items()
        if folder is not None
    }
    memory = loaded["adapted"].memory if "adapted" in loaded else None
    original = load_model(source, torch.bfloat16, memory, weights="dense")
    readers = {"original": Reader(original.net, original.net)}
    for name, model in loaded.items():
        # A frozen adapter's own copy of the checkpoint is let go: the original writes for all of them.
        writer = original.net if model.writer is not None else model.net
        readers[name] = Reader(model.net.with_memory(original.memory), writer)
    return readers, original.tokenizer


def about(source: str | Path, readers: dict[str, Reader], **adapters: Any) -> dict[str, Any]:
    """What answers depend on: checkpoint, memory configuration, and of each reader its adapter's hash."""
    hashes: dict[str, str | None] = {"original": None}
    for name, adapter in adapters.items():
        if adapter not in (None, "none"):
            file = adapter_folder(adapter, source) / WEIGHTS
            hashes[name.replace("_", " ")] = hash_files([file])[:32]
    memory = readers["original"].net.memory
    return {"model": str(source), "readers": hashes, "memory": dataclasses.asdict(memory)}


def books(source: str | Path, adapter: str | None) -> list[Codec]:
    """The codebooks that come with an adapter, if any."""
    if adapter in (None, "none"):
        return []
    file = adapter_folder(adapter, source) / BOOKS
    return [Codec.from_bytes(file.read_bytes())] if file.is_file() else []
