"""What an adapter costs elsewhere: loss on general text, without memory, of every reader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.tokenizer import Tokenizer
from ..train.batch import Sample
from .answer import Answerer
from .arms import Reader

LENGTH = 256  # tokens of a window
BATCH = {"cpu": 4, "cuda": 128}

Windows = Mapping[str, Sequence[tuple[int, ...]]]


def cut_windows(files: Iterable[Path], tokenizer: Tokenizer, windows: int, seed: int = 0) -> dict[str, list[tuple]]:
    """Pieces of each file by its name, drawn by seed; a folder stands for the text files in it, joined.

    Raises ValueError for a file that is shorter than one window.
    """
    found = {}
    for file in files:
        parts = sorted(p for p in file.rglob("*.txt") if p.is_file()) if file.is_dir() else [file]
        ids = tokenizer.encode("\n\n".join(p.read_text(encoding="utf-8", errors="replace") for p in parts))
        if len(ids) < LENGTH:
            raise ValueError(f"{file}: expected at least {LENGTH} tokens, got {len(ids)}")
        starts = range(0, len(ids) - LENGTH + 1, LENGTH)
        drawn = sorted(random.Random(f"{seed} {file.name}").sample(starts, min(windows, len(starts))))
        found[file.name] = [tuple(ids[s : s + LENGTH]) for s in drawn]
    return found


def general_losses(
    readers: Mapping[str, Reader],
    tokenizer: Tokenizer,
    texts: Windows,
    tick: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Rows as Evaluation.run makes them: set is the text's name, arm "READER: no memory", id the window's number."""
    rows: list[dict[str, Any]] = []
    for text, windows in texts.items():
        for name, reader in readers.items():
            answerer, opening = Answerer(reader.net, tokenizer), reader.net.memory.context_bos_ids
            size = BATCH[answerer.device.type]
            for at in range(0, len(windows), size):
                part = windows[at : at + size]
                samples = [Sample((*opening, *ids), max(1, len(opening))) for ids in part]
                for i, loss in enumerate(answerer.losses(samples, None)):
                    tokens = len(samples[i].ids) - samples[i].first
                    rows.append({"arm": f"{name}: no memory", "set": text, "id": f"{text}-{at + i}",
                                 "loss": loss, "tokens": tokens, "gold": False})  # fmt: skip
                tick(len(part))
    return rows
