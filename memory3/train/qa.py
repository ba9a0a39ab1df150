"""Tuning on questions and answers: what is asked, which references are read, and the loss on held-out titles.

The query of the retriever is the question alone; memories are fixed before the first answer token. In training a
question's own ("gold") reference is put among the retrieved ones, except for a share of the questions, so that a model
also learns to do without; evaluation reads what the retriever finds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..config import MemoryConfig
from ..data import Entry
from ..embed import SupportsEncode
from .batch import Piece, Sample
from .config import TrainConfig
from .holdout import Decontaminator, split_of, title_key
from .questions import passage, questions_about
from .text import pick

if TYPE_CHECKING:
    from ..bank import Bank, Reference
    from ..model.tokenizer import Tokenizer

CANDIDATES = 16  # retrieved per question; those of other splits are left out of training
MIX = {"fact": 0.25, "reverse": 0.15, "cloze": 0.4, "passage": 0.2}
Decode = Callable[[Sequence[int]], str]


class Item(NamedTuple):
    """A question as tokens; gold: the record that answers it; found: record ids as retrieved, best first."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    gold: bytes
    found: tuple[bytes, ...] = ()


class Questions(NamedTuple):
    """All questions about a bank by split, and the split of every record."""

    items: dict[str, list[Item]]
    split: dict[bytes, str]


def ask_about(
    bank: Bank,
    tokenizer: Tokenizer,
    memory: MemoryConfig,
    guard: Decontaminator | None = None,
    seed: int = 0,
    rounds: int = 1,
) -> Questions:
    """Questions about every reference of a bank, each with a prompt of at most one chunk.

    rounds: how often each reference is asked about, other words being left out of its sentences each time.

    A reference that shares a 13-gram with evaluation texts (`guard`) is not asked about; nor is a question with two
    different answers.
    """
    items: dict[str, list[Item]] = {"train": [], "dev": [], "test": []}
    split: dict[bytes, str] = {}
    for record in bank.ids():
        reference = bank.reference(record)
        key = title_key(Entry(reference.title, reference.text, reference.source))
        split[record] = split_of(key)
        if guard is not None and guard.shares(reference.text):
            continue
        into = items[split[record]]
        for turn in range(rounds):
            rng = random.Random(f"{seed + turn} {record.hex()}")
            into.extend(_items(reference, record, tokenizer, rng))
    return Questions({name: _unambiguous(part, memory.chunk) for name, part in items.items()}, split)


def _items(reference: Reference, record: bytes, tokenizer: Tokenizer, rng: random.Random) -> Iterator[Item]:
    for asked in questions_about(reference.title, reference.text, reference.source, rng):
        space = "" if asked.prompt.endswith(("\n", " ")) else " "
        answer = tokenizer.encode(space + asked.answer + ("\n" if asked.stops else ""))
        yield Item(asked.kind, tuple(tokenizer.encode(asked.prompt)), tuple(answer), record)
    given, wanted = passage(reference.token_ids, rng)
    if given:
        yield Item("passage", tuple(given), tuple(wanted), record)


def _unambiguous(items: Iterable[Item], longest: int) -> list[Item]:
    answers: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    items = [i for i in items if 0 < len(i.prompt) <= longest and i.answer]
    for item in items:
        answers.setdefault(item.prompt, set()).add(item.answer)
    seen: set[tuple[int, ...]] = set()
    return [i for i in items if len(answers[i.prompt]) == 1 and not (i.prompt in seen or seen.add(i.prompt))]


class Retriever:
    """Puts into items what a bank's retriever finds for their prompts; remembers the latest `keep` answers."""

    def __init__(self, bank: Bank, embedder: SupportsEncode, decode: Decode, keep: int = 100_000) -> None:
        self._bank, self._embedder, self._decode, self._keep = bank, embedder, decode, keep
        self._known: dict[tuple[int, ...], tuple[bytes, ...]] = {}

    def __call__(self, items: Sequence[Item]) -> list[Item]:
        """The items with `found`, best first; one search for all that are not known."""
        new = list(dict.fromkeys(i.prompt for i in items if i.prompt not in self._known))
        if new:
            rows, _ = self._bank.search(self._embedder.encode([self._decode(p) for p in new]), CANDIDATES)
            self._known.update(zip(new, map(tuple, rows), strict=True))
        out = [item._replace(found=self._known[item.prompt]) for item in items]
        while len(self._known) > self._keep:
            self._known.pop(next(iter(self._known)))
        return out


class Reader:
    """Questions as sequences: reading memories, the same references as text, or nothing."""

    def __init__(self, memory: MemoryConfig, tokens: Callable[[bytes], list[int]]) -> None:
        self.memory, self._tokens = memory, tokens

    def sample(self, item: Item, read: str, reads: Sequence[bytes]) -> Sample:
        """read: "memory", "text" or "none"; reads: most similar first (as text it stands last, by the question)."""
        opening = self.memory.context_bos_ids
        front: list[int] = []
        if read == "text":
            for record in reversed(reads):
                front += [*self.memory.prefix_ids, *self._tokens(record)[: self.memory.span]]
        ids = (*front, *opening, *item.prompt, *item.answer)
        pieces = (Piece(len(ids), tuple(reads)),) if read == "memory" else ()
        return Sample(ids, len(ids) - len(item.answer), pieces)

    def plain(self, tokens: Sequence[int], held: bool = False) -> Sample:
        """Text without memory, every token predicted, or held to the base weights."""
        opening = self.memory.context_bos_ids
        return Sample((*opening, *map(int, tokens)), max(1, len(opening)), held=held)


class QuestionSource:
    """Training questions, kinds mixed as MIX says, drawn anew at every step by seed and step.

    config.own_refs of a question's references are its own (gold and most similar); the rest are borrowed from its
    neighbours in the same micro-batch, so that live writing encodes fewer.

    allowed    records that may be read; retriever: puts what it finds into items
    plain      sequences of plain text as token lists, config.plain of every batch, each epoch in an order of its own
    coded      what to add to a record id to read it through a codec (memory3.train.resident)
    """

    def __init__(
        self,
        items: Sequence[Item],
        reader: Reader,
        config: TrainConfig,
        allowed: set[bytes],
        retriever: Callable[[Sequence[Item]], list[Item]],
        plain: Sequence[Sequence[int]] = (),
        coded: int | None = None,
    ) -> None:
        self.pools = {k: [i for i in items if i.kind == k] for k in MIX}
        self.pools = {k: pool for k, pool in self.pools.items() if pool}
        if not self.pools:
            raise ValueError("items: there is no question to train on; give a bank with longer texts")
        self.reader, self.config, self.allowed, self.retriever = reader, config, allowed, retriever
        self.plain, self.coded = plain, coded
        self.records = sorted(allowed)
        self._plain = round(config.plain * config.batch)
        if self._plain and not len(plain):
            raise ValueError("plain: expected text to train on beside the questions, got none; give texts")
        if config.quantised and coded is None:
            raise ValueError("quantised: only memories that stay on the device can be read through a codec")

    def samples(self, step: int) -> list[Sample]:
        config, rng = self.config, random.Random(f"{self.config.seed} {step}")
        kinds = list(self.pools)
        weights = [MIX[k] for k in kinds]
        asked = config.batch - self._plain
        chosen = [rng.choice(self.pools[k]) for k in rng.choices(kinds, weights, k=asked)]
        if config.read != "none":
            chosen = self.retriever(chosen)
        out: list[Sample] = []
        for start in range(0, asked, config.borrow):
            group = chosen[start : start + config.borrow]
            own = [self._own(item, rng) for item in group]
            for i, item in enumerate(group):
                if config.read == "none" or rng.random() < config.drop_memory:
                    out.append(self.reader.sample(item, "none", ()))
                else:
                    reads = self._fill(own, i, group[i].gold, rng)
                    if config.quantised and rng.random() < config.quantised:
                        reads = [record + self.coded for record in reads]
                    out.append(self.reader.sample(item, config.read, reads))
        return out + self._text(step)

    def _text(self, step: int) -> list[Sample]:
        if not self._plain:
            return []
        chosen = pick(len(self.plain), step, self._plain, self.config.seed)
        return [self.reader.plain(self.plain[i], self.config.plain_loss == "base") for i in chosen]

    def _own(self, item: Item, rng: random.Random) -> list[bytes]:
        if self.config.drop_found and rng.random() < self.config.drop_found:
            return [r for r in rng.sample(self.records, self.reader.memory.refs) if r != item.gold]
        others = [r for r in item.found if r != item.gold and r in self.allowed]
        wanted = min(self.config.own_refs, self.reader.memory.refs)
        if rng.random() < self.config.drop_gold:
            return others[:wanted]
        place = item.found.index(item.gold) if item.gold in item.found else wanted - 1
        reads = others[: wanted - 1]
        reads.insert(min(place, len(reads)), item.gold)
        return reads

    def _fill(self, own: Sequence[Sequence[bytes]], i: int, gold: bytes, rng: random.Random) -> list[bytes]:
        """Own references, then borrowed ones; a borrowed gold would undo that it was dropped."""
        missing = self.reader.memory.refs - len(own[i])
        if missing <= 0:
            return list(own[i])
        around = {r for j, reads in enumerate(own) if j != i for r in reads} - set(own[i]) - {gold}
        return [*own[i], *rng.sample(sorted(around), min(missing, len(around)))]
