"""What is asked, and the references it is asked among.

    squad, sciq              benchmark questions; among 20,000 references: their passages, Wikipedia leads, BoolQ's
    wiki                     "What is X?", answered by the first sentence of a lead; the same references
    factbook, foldoc, vera   country facts, definitions (the first sentence) and acronyms; among the references of their
                             own held-out titles
    wiki-known, factbook-known   the same about titles of the training split, closed book only: what the weights know

Only titles of the "test" split are asked about in what could be trained on (memory3.train.holdout).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import data
from ..bank.corpus import Chunk, Encode, pack
from ..data import Entry
from ..demo.questions import fact_question, sentence_question
from ..embed import SupportsEncode
from ..train.holdout import in_split
from . import sources

MAIN, HELD, CLOSED = "main", "held", "closed"
SETS = {"squad": MAIN, "sciq": MAIN, "wiki": MAIN, "factbook": HELD, "foldoc": HELD, "vera": HELD}
KNOWN = ("wiki-known", "factbook-known")
SETS |= dict.fromkeys(KNOWN, CLOSED)
BENCHMARKS = ("squad", "sciq")
FORM = "Question: {}\nAnswer:"
EMBEDDED = 1024  # references of one file of vectors
LONGEST = 64  # tokens of a prompt: one chunk, which is one retrieval
# The first sentence of a dictionary's article, behind other names and remarks in brackets.
_DEFINITION = re.compile(
    r"^(?:[^.(]{0,40}\([^)]*\) *)*(?P<first>(?:An?|The|Any|One) .{15,200}?[a-z)\]\"'0-9]{2}\.)(?= [A-Z(\[]|$)"
)


class Question(NamedTuple):
    """prompt: all that the retriever and the model see; answer: what is scored after it, a space between.

    answers   right answers for exact match and F1
    gold      numbers of the references that hold the answer; related: all references of the same passage or title
    """

    set: str
    id: str
    prompt: str
    answer: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


class References:
    """References by number, with their vectors once `embed` was called."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self.tokens = [c.token_ids for c in self.chunks]
        self.vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def embed(self, embedder: SupportsEncode, folder: Path) -> References:
        """Encode all references in blocks, each kept in `folder` under the hash of its texts."""
        folder.mkdir(parents=True, exist_ok=True)
        blocks = []
        for start in range(0, len(self.chunks), EMBEDDED):
            texts = [c.text for c in self.chunks[start : start + EMBEDDED]]
            digest = hashlib.sha256("\0".join([embedder.name, *texts]).encode()).hexdigest()[:24]
            file = folder / f"{digest}.npy"
            if not file.is_file():
                part = folder / "part.npy"
                np.save(part, embedder.encode(texts))
                part.replace(file)
            blocks.append(np.load(file))
        self.vectors = np.concatenate(blocks)
        return self

    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """int [Q, count], most similar first."""
        scores = vectors @ self.vectors.T
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)


def references(which: str, encode: Encode, span: int) -> References:
    """The "main", "held" or "closed" references. Raises DataMissing naming the package that is not installed."""
    return References(list(_unique(c for entry in _entries(which) for c in pack(entry, encode, span))))


def _unique(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    seen: set[str] = set()
    for chunk in chunks:
        if chunk.text not in seen:
            seen.add(chunk.text)
            yield chunk


def _entries(which: str) -> Iterator[Entry]:
    if which == MAIN:
        yield from data.wiki()
        for name, asked in (("squad", sources.squad()), ("sciq", sources.sciq())):
            for passage in dict.fromkeys((a.title, a.passage) for a in asked):
                yield Entry(*passage, name)
        yield from sources.boolq_passages()
    elif which == CLOSED:
        yield from in_split(data.wiki(), "train")
        yield from in_split(data.factbook(), "train")
    else:
        yield from in_split(data.factbook(), "test")
        yield from in_split(sources.foldoc(), "test")
        yield from in_split(sources.vera(), "test")


def questions(name: str, among: References, count: int, encode: Encode, seed: int = 0) -> list[Question]:
    """At most `count` questions of a set, drawn by seed; those with two different answers are left out."""
    found = list(_benchmark(name, among) if name in BENCHMARKS else _made(name, among))
    asked = Counter(q.prompt for q in found)
    found = [q for q in found if asked[q.prompt] == 1 and len(encode(q.prompt)) < LONGEST and q.gold]
    random.Random(f"{seed} {name}").shuffle(found)
    return found[:count]


def _benchmark(name: str, among: References) -> Iterator[Question]:
    where: dict[str, list[int]] = {}
    for number, chunk in enumerate(among.chunks):
        if chunk.source == name:
            where.setdefault(chunk.title, []).append(number)
    for i, asked in enumerate(getattr(sources, name)()):
        pieces = [n for n in where.get(asked.title, ()) if _body(among.chunks[n]) in asked.passage]
        holding = [n for n in pieces if any(a.lower() in among.chunks[n].text.lower() for a in asked.answers)]
        prompt = FORM.format(asked.question)
        yield Question(
            name, f"{name}-{i}", prompt, asked.answers[0], asked.answers, tuple(holding or pieces), tuple(pieces)
        )


def _body(chunk: Chunk) -> str:
    """A reference without the title that a continued one begins with."""
    return chunk.text[len(chunk.text) - (chunk.end - chunk.start) :]


def _made(name: str, among: References) -> Iterator[Question]:
    related: dict[str, list[int]] = {}
    source = name.removesuffix("-known")
    for number, chunk in enumerate(among.chunks):
        if chunk.source == source:
            related.setdefault(chunk.title, []).append(number)
    held = {c.title for c in among.chunks if c.source == source}
    if name == "wiki":  # all leads are among the references, only some are held out
        held = {e.title for e in in_split(data.wiki(), "test")}
    for number, chunk in enumerate(among.chunks):
        if chunk.source != source or chunk.title not in held:
            continue
        if name == "vera":
            answer = re.sub(r"^.* stands for |\.$", "", chunk.text)
            prompt = FORM.format(f"What does {chunk.title} stand for?")
        elif name == "foldoc":
            defined = _DEFINITION.match(chunk.text.removeprefix(f"{chunk.title}: ")) if chunk.start == 0 else None
            if defined is None:
                continue
            prompt, answer = FORM.format(f"What is {chunk.title}?"), defined["first"]
        else:
            made = (
                fact_question(chunk.text, number)
                if source == "factbook"
                else sentence_question(chunk.title, chunk.text, number)
            )
            if made is None:
                continue
            prompt, answer = made.prompt, made.answer
        yield Question(name, f"{name}-{number}", prompt, answer, (answer,), (number,), tuple(related[chunk.title]))
