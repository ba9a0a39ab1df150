"""What may be trained on: splits by hash of title, and texts that share 13 words in a row with evaluation data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from ..data import Entry

SPLITS = ("train", "dev", "test")
DEV, TEST = 0.1, 0.1
GRAM = 13
_WORD = re.compile(r"\w+")


def split_of(title: str) -> str:
    """ "train" (80 %), "dev" or "test" (10 % each), fixed by the SHA-256 of the title, whatever else is in a corpus."""
    value = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") / 2**64
    return "test" if value < TEST else "dev" if value < TEST + DEV else "train"


def title_key(entry: Entry) -> str:
    """What an entry is split by: its title; for a field of the factbook its country, so that no country is in two."""
    return entry.title.partition(" - ")[0] if entry.source == "factbook" else entry.title


def in_split(entries: Iterable[Entry], split: str) -> Iterator[Entry]:
    """The entries of one split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return (entry for entry in entries if split_of(title_key(entry)) == split)


class Decontaminator:
    """The 13-grams of words (letter case and punctuation apart) of evaluation passages, questions and answers.

    Texts shorter than 13 words have none, so that a short answer such as a name excludes nothing by itself.
    """

    def __init__(self, texts: Iterable[str] = (), gram: int = GRAM) -> None:
        if gram < 1:
            raise ValueError(f"gram: expected at least 1, got {gram}")
        self.gram = gram
        self._seen: set[int] = set()
        for text in texts:
            self._seen.update(self._grams(text))

    def __len__(self) -> int:
        return len(self._seen)

    def shares(self, text: str) -> bool:
        """Whether `text` has a 13-gram with any evaluation text in common."""
        return any(gram in self._seen for gram in self._grams(text))

    def clean(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries that may be trained on."""
        return (entry for entry in entries if not self.shares(entry.text))

    def _grams(self, text: str) -> Iterator[int]:
        words = _WORD.findall(text.casefold())
        for i in range(len(words) - self.gram + 1):
            digest = hashlib.blake2b(" ".join(words[i : i + self.gram]).encode(), digest_size=8).digest()
            yield int.from_bytes(digest, "big")
