"""What may be trained on: splits by hash of title, and texts that share 13 words in a row with evaluation data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from ..data import Entry

SPLITS = ("train", "dev", "test")
DEV, TEST = 0.1, 0.1
GRAM = 13
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


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
        self._words: dict[str, int] = {}
        parts = [grams for text in texts if len(grams := self._grams(text))]
        self._seen = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._seen)

    def shares(self, text: str) -> bool:
        """Whether `text` has a 13-gram with any evaluation text in common."""
        if not len(self._seen):
            return False
        grams = self._grams(text)
        places = np.searchsorted(self._seen, grams).clip(max=len(self._seen) - 1)
        return bool((self._seen[places] == grams).any())

    def clean(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries that may be trained on."""
        return (entry for entry in entries if not self.shares(entry.text))

    def _grams(self, text: str) -> np.ndarray:
        """uint64 [words - 12]: a polynomial in the words' 64-bit hashes for each run of 13."""
        words = _WORD.findall(text.casefold())
        count = len(words) - self.gram + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        hashes = np.array([self._word(w) for w in words], np.uint64)
        total = np.zeros(count, np.uint64)
        for j in range(self.gram):  # modulo 2^64
            total = total * _FACTOR + hashes[j : j + count]
        return total

    def _word(self, word: str) -> int:
        found = self._words.get(word)
        if found is None:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            found = self._words[word] = int.from_bytes(digest, "little")
        return found
