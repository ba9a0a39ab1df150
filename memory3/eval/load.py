"""Weights for an evaluation: the checkpoint, its adapter, and adapters that were trained as rivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank.codec import Codec
from ..config import MemoryConfig
from ..identity import hash_files
from ..model.adapted import Adapted, adapter_folder
from ..model.llama import Llama
from ..model.load import Checkpoint, default_memory, fill, open_checkpoint
from ..model.tokenizer import Tokenizer
from ..train.lora import WEIGHTS
from .arms import Reader

BOOKS = "codebooks.bin"
LOADERS = 4  # adapters put on at once


class _Held:
    """A checkpoint whose tensors are unpacked once, for all adapters that are added to them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._tensors = checkpoint, {}
        self.config, self._hash = checkpoint.config, checkpoint.hash()

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._checkpoint.tensor(name)
        return self._tensors[name]

    def blocks(self, name: str) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def hash(self) -> str:
        return self._hash


def load_readers(
    source: str | Path,
    adapter: str | None,
    *,
    closed_book: Path | None = None,
    text_reader: Path | None = None,
    also: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Reader], Tokenizer]:
    """Readers by name: "original", and "adapted", "closed book", "reader of text" where adapters are given.

    adapter: a folder, "shipped", or None ("none"); all of those have its memory configuration. also: further adapters
    by name, each with its own.
    """
    opened, preset = open_checkpoint(source)
    checkpoint = _Held(opened)
    tokenizer = checkpoint.tokenizer()
    memory = preset or default_memory(checkpoint.config, tokenizer)
    named = {
        "adapted": None if adapter in (None, "none") else adapter_folder(adapter, source),
        "closed book": closed_book,
        "reader of text": text_reader,
    }
    if named["adapted"] is not None:
        memory = Adapted(checkpoint, named["adapted"]).memory(memory)
    base = _dense(checkpoint, memory, device)
    kinds = {"closed book": "none", "reader of text": "text"}

    def adapt(name: str, folder: Path) -> Reader:
        adapted = Adapted(checkpoint, folder)
        net = _dense(adapted, memory if name in named else adapted.memory(memory), device)
        reads = kinds.get(name) or adapted.about.get("read", "memory")
        return Reader(net, net if adapted.writes else base, reads)

    wanted = {name: folder for name, folder in {**named, **(also or {})}.items() if folder is not None}
    with ThreadPoolExecutor(LOADERS) as pool:
        found = dict(zip(wanted, pool.map(adapt, wanted, wanted.values()), strict=True))
    return {"original": Reader(base, base), **found}, tokenizer


def _dense(checkpoint: Checkpoint, memory: MemoryConfig, device: torch.device | str) -> Llama:
    with torch.device("meta"):
        net = Llama(checkpoint.config, memory)
    fill(net, checkpoint, torch.bfloat16, device)
    return net.eval()


def about(source: str | Path, readers: Mapping[str, Reader], **adapters: Any) -> dict[str, Any]:
    """What answers depend on: checkpoint, memory configuration, and of each reader its adapter's hash.

    adapters by the readers' names, "_" for a space; those named as `also` in a mapping of that name.
    """
    hashes: dict[str, str | None] = {"original": None}
    also = adapters.pop("also", None) or {}
    for name, adapter in [*((n.replace("_", " "), a) for n, a in adapters.items()), *also.items()]:
        if adapter not in (None, "none"):
            hashes[name] = hash_files([adapter_folder(adapter, source) / WEIGHTS])[:32]
    memory = readers["original"].net.memory
    return {"model": str(source), "readers": hashes, "memory": dataclasses.asdict(memory)}


def books(source: str | Path, adapter: str | None) -> list[Codec]:
    """The codebooks that come with an adapter, if any."""
    if adapter in (None, "none"):
        return []
    file = adapter_folder(adapter, source) / BOOKS
    return [Codec.from_bytes(file.read_bytes())] if file.is_file() else []
