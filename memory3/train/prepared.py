"""A tuning run's data in one file: prepared where the texts, the embedder and the index are, trained where the GPU is.

    memory3 train --config smollm2-135m --stage sft --reference wiki --exclude evaluation.jsonl --prepare smol.npz
    memory3 train --config smollm2-135m --stage sft --prepared smol.npz --out runs/smol

The file holds token ids: references, questions with their answers and the numbers of the references that the retriever
found, and plain text. It needs the tokenizer it was made with, and serves runs of any memory configuration whose span
and chunk are not smaller.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import MemoryConfig
from .files import whole
from .qa import CANDIDATES, MIX, Item, Questions

if TYPE_CHECKING:
    from ..bank import Bank
    from ..model.tokenizer import Tokenizer

VERSION = 1
PLAIN_LENGTH = 256  # tokens of a sequence of plain text


@dataclass(frozen=True)
class Ragged:
    """Lists of token ids, one after the other."""

    flat: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Token ids below 65,536 take two bytes each."""
        flat = np.fromiter((t for x in lists for t in x), np.int64, sum(map(len, lists)))
        small = not len(flat) or flat.max() < 1 << 16
        return cls(flat.astype(np.uint16 if small else np.int32), np.cumsum([len(x) for x in lists], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def lists(self) -> list[list[int]]:
        starts = [0, *self.ends[:-1].tolist()]
        flat = self.flat.tolist()
        return [flat[a:b] for a, b in zip(starts, self.ends.tolist(), strict=True)]


@dataclass(frozen=True)
class Prepared:
    """Everything of a tuning run but the model.

    references  token ids by number; train: numbers of those that training may read
    items       questions by split ("train", "dev"); gold and found are numbers of references
    plain       int [N, PLAIN_LENGTH], sequences of plain text to train on; plain_dev: held-out ones
    """

    tokenizer_hash: str
    span: int
    references: list[list[int]]
    train: frozenset[int]
    items: dict[str, list[Item]]
    plain: np.ndarray
    plain_dev: np.ndarray

    def save(self, path: Path) -> None:
        """One compressed file, complete or not there."""
        arrays = {
            "version": np.int64(VERSION), "tokenizer": np.array(self.tokenizer_hash), "span": np.int64(self.span),
            "train": np.array(sorted(self.train), np.int32), "plain": self.plain.astype(np.uint16),
            "plain_dev": self.plain_dev.astype(np.uint16),
        }  # fmt: skip
        parts = {"references": self.references}
        kinds = list(MIX)
        for split, items in self.items.items():
            parts |= {f"{split}.prompt": [i.prompt for i in items], f"{split}.answer": [i.answer for i in items]}
            found = np.full((len(items), CANDIDATES), -1, np.int32)
            for row, item in zip(found, items, strict=True):
                row[: len(item.found)] = item.found
            arrays |= {
                f"{split}.kind": np.array([kinds.index(i.kind) for i in items], np.uint8),
                f"{split}.gold": np.array([i.gold for i in items], np.int32), f"{split}.found": found,
            }  # fmt: skip
        for name, lists in parts.items():
            ragged = Ragged.of(lists)
            arrays |= {name: ragged.flat, f"{name}.ends": ragged.ends}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Inverse of save. Raises ValueError for another kind or version of file."""
        with np.load(path) as file:
            if "version" not in file or int(file["version"]) != VERSION:
                raise ValueError(f"{path} is no prepared run of version {VERSION}; make it again with --prepare")
            arrays = dict(file)

        def lists(name: str) -> list[list[int]]:
            return Ragged(arrays[name], arrays[f"{name}.ends"]).lists()

        kinds = list(MIX)
        items = {}
        for split in ("train", "dev"):
            columns = zip(
                arrays[f"{split}.kind"].tolist(), lists(f"{split}.prompt"), lists(f"{split}.answer"),
                arrays[f"{split}.gold"].tolist(), arrays[f"{split}.found"].tolist(), strict=True,
            )  # fmt: skip
            items[split] = [
                Item(kinds[kind], tuple(prompt), tuple(answer), gold, tuple(n for n in found if n >= 0))
                for kind, prompt, answer, gold, found in columns
            ]
        return cls(
            str(arrays["tokenizer"]), int(arrays["span"]), lists("references"),
            frozenset(arrays["train"].tolist()), items, arrays["plain"], arrays["plain_dev"],
        )  # fmt: skip

    def check(self, tokenizer: Tokenizer, memory: MemoryConfig) -> None:
        """Raise ValueError unless it was made for this tokenizer and holds enough of each reference."""
        if self.tokenizer_hash != tokenizer.hash:
            raise ValueError("the prepared run holds token ids of another tokenizer; make it again with --prepare")
        if self.span < memory.span:
            raise ValueError(f"memory.span: the prepared run's references have {self.span} tokens, not {memory.span}")


def collect(
    bank: Bank,
    asked: Questions,
    retrieve: Callable[[Sequence[Item]], list[Item]],
    tokenizer: Tokenizer,
    memory: MemoryConfig,
    plain: np.ndarray,
    plain_dev: np.ndarray,
    *,
    train_items: int | None = None,
    dev_items: int = 512,
    seed: int = 0,
) -> Prepared:
    """Questions with what is found for them, and the references that a run on them can read.

    train_items, dev_items: so many questions of each split, drawn by `seed` (None: all).
    References of other splits than "train" are kept where a question of the dev split finds them.
    """
    drawn: dict[str, list[Item]] = {}
    for split, limit in (("train", train_items), ("dev", dev_items)):
        items = list(asked.items[split])
        random.Random(f"evaluation {seed}").shuffle(items)
        drawn[split] = retrieve(items[:limit])
    training = {record for record, split in asked.split.items() if split == "train"}
    kept = training | {r for i in drawn["dev"] for r in (i.gold, *i.found[: memory.refs])}
    number = {record: n for n, record in enumerate(sorted(kept))}
    items = {
        split: [
            i._replace(gold=number[i.gold], found=tuple(number[r] for r in i.found if r in number)) for i in part
        ]
        for split, part in drawn.items()
    }  # fmt: skip
    # A dev question reads what was found for it, all of which is kept; one of training, what training may read.
    allowed = frozenset(number[r] for r in training)
    items["train"] = [i._replace(found=tuple(n for n in i.found if n in allowed)) for i in items["train"]]
    items["dev"] = [i._replace(found=i.found[: memory.refs]) for i in items["dev"]]
    references = [bank.token_ids(record)[: memory.span] for record in number]
    return Prepared(tokenizer.hash, memory.span, references, allowed, items, plain, plain_dev)
