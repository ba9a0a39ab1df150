"""What an adapter costs elsewhere: loss on general text, without memory, of every reader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..model.tokenizer import Tokenizer
from ..train.batch import Sample
from .answer import Answerer
from .run import Reader

LENGTH = 256  # tokens of a window
BATCH = 4


def general_losses(
    readers: Mapping[str, Reader],
    tokenizer: Tokenizer,
    files: Iterable[Path],
    windows: int,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Rows as Evaluation.run makes them: set is the file's name, arm "READER: no memory", id the window's place.

    windows: pieces of each file, drawn by seed; a folder stands for the text files in it, joined.
    Raises ValueError for a file that is shorter than one window.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        parts = sorted(p for p in file.rglob("*.txt") if p.is_file()) if file.is_dir() else [file]
        ids = tokenizer.encode("\n\n".join(p.read_text(encoding="utf-8", errors="replace") for p in parts))
        if len(ids) < LENGTH:
            raise ValueError(f"{file}: expected at least {LENGTH} tokens, got {len(ids)}")
        starts = range(0, len(ids) - LENGTH + 1, LENGTH)
        drawn = sorted(random.Random(f"{seed} {file.name}").sample(starts, min(windows, len(starts))))
        for name, reader in readers.items():
            answerer = Answerer(reader.net, tokenizer)
            opening = reader.net.memory.context_bos_ids
            for at in range(0, len(drawn), BATCH):
                part = drawn[at : at + BATCH]
                samples = [Sample((*opening, *ids[s : s + LENGTH]), max(1, len(opening))) for s in part]
                for start, sample, loss in zip(part, samples, answerer.losses(samples, None), strict=True):
                    tokens = len(sample.ids) - sample.first
                    rows.append({"arm": f"{name}: no memory", "set": file.name, "id": f"{file.name}-{start}",
                                 "loss": loss, "tokens": tokens, "gold": False})  # fmt: skip
                tick(len(part))
    return rows
