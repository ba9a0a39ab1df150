"""What is asked and among which references, as token ids in one file: prepared where the texts are, asked anywhere.

    memory3 eval --prepare questions.npz            needs the texts' packages and the embedder
    memory3 eval --prepared questions.npz           needs the checkpoint alone

The file is a compressed .npz: of each knowledge base "KIND.tokens" (uint16, uint32 for large vocabularies) and
"KIND.ends" int64, and "about", JSON in UTF-8 with the questions. What is found for a question is in it, best first;
random references are drawn from its id when it is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..embed import SupportsEncode
from ..model.tokenizer import Tokenizer
from ..train.overlap import EVALUATION_LIMIT, overlap
from .sets import CLOSED, SETS, Question, References, questions, references

CANDIDATES = 24
VERSION = 1


class Asked(NamedTuple):
    """A question as tokens.

    prompt    what the model sees after the context's opening; answer: what is scored
    answers   right answers in words; gold and related: numbers of references (memory3.eval.sets.Question)
    found     numbers of references as retrieved, best first, without those that say what is asked
    """

    set: str
    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]
    found: tuple[int, ...]


class TokenLists(Sequence[list[int]]):
    """Token lists of references in one array; ends int64 [N], where each stops."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self.flat, self.ends = flat, ends

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> TokenLists:
        lists = list(lists)
        flat = np.fromiter((t for one in lists for t in one), np.int64)
        small = not len(flat) or flat.max() < 1 << 16
        return cls(flat.astype(np.uint16 if small else np.uint32), np.cumsum([len(x) for x in lists], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> list[int]:
        start = self.ends[number - 1] if number else 0
        return self.flat[start : self.ends[number]].tolist()


@dataclass(frozen=True)
class Plan:
    """How much is asked: questions per set, drawn by seed."""

    counts: Mapping[str, int]
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.counts) - set(SETS))
        if unknown:
            raise ValueError(f"sets: expected some of {', '.join(SETS)}, got {unknown}")


@dataclass(frozen=True)
class Prepared:
    """Everything about an evaluation that no model is needed for.

    tokenizer  its hash; span: most tokens of a reference; seed: drew the questions
    among      references by knowledge base; asked: questions by set
    texts      windows of general text by name
    """

    tokenizer: str
    span: int
    seed: int
    among: Mapping[str, Sequence[list[int]]]
    asked: Mapping[str, Sequence[Asked]]
    texts: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)

    def fewer(self, counts: Mapping[str, int]) -> Prepared:
        """At most so many questions of each set, and only these sets; the first ones are a draw by seed."""
        asked = {name: self.asked[name][:n] for name, n in counts.items() if name in self.asked and n}
        return Prepared(self.tokenizer, self.span, self.seed, self.among, asked, self.texts)

    def check(self, tokenizer: Tokenizer, span: int) -> Prepared:
        """Raises ValueError when it was prepared for another tokenizer or span."""
        for name, have, want in (("tokenizer", self.tokenizer, tokenizer.hash), ("span", self.span, span)):
            if have != want:
                raise ValueError(f"the questions were prepared for the {name} {have}, this model's is {want}")
        return self

    def save(self, file: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        for which, lists in self.among.items():
            lists = lists if isinstance(lists, TokenLists) else TokenLists.of(lists)
            arrays |= {f"{which}.tokens": lists.flat, f"{which}.ends": lists.ends}
        about: dict[str, Any] = {
            "version": VERSION, "tokenizer": self.tokenizer, "span": self.span, "seed": self.seed,
            "asked": {name: [q[1:] for q in part] for name, part in self.asked.items()}, "texts": dict(self.texts),
        }  # fmt: skip
        arrays["about"] = np.frombuffer(json.dumps(about, ensure_ascii=False).encode(), np.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            np.savez_compressed(out, **arrays)

    @classmethod
    def load(cls, file: Path) -> Prepared:
        """Raises ValueError for a file that `save` of this version did not write."""
        try:
            with np.load(file) as arrays:
                about = json.loads(arrays["about"].tobytes())
                kinds = [name.removesuffix(".ends") for name in arrays.files if name.endswith(".ends")]
                among = {k: TokenLists(arrays[f"{k}.tokens"], arrays[f"{k}.ends"]) for k in kinds}
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{file} holds no prepared questions: {error}; make it with memory3 eval --prepare"
            ) from None
        if about.get("version") != VERSION:
            raise ValueError(f"{file} has version {about.get('version')}, expected {VERSION}; prepare it again")
        asked = {
            name: [Asked(name, q[0], *(tuple(x) for x in q[1:])) for q in part] for name, part in about["asked"].items()
        }
        texts = {name: [tuple(ids) for ids in part] for name, part in about["texts"].items()}
        return cls(about["tokenizer"], about["span"], about["seed"], among, asked, texts)


def prepare(
    plan: Plan,
    tokenizer: Tokenizer,
    span: int,
    embedder: SupportsEncode,
    vectors: Path,
    notify: Callable[[str], None] = lambda what: None,
) -> Prepared:
    """Cut and embed the references (vectors are kept in a folder), draw the questions, and look up what they find."""
    bases: dict[str, References] = {}
    for which in dict.fromkeys(SETS[name] for name in plan.counts):
        bases[which] = references(which, tokenizer.encode_reference, span)
        if which != CLOSED:
            notify(f"embedding the {which} references")
            bases[which].embed(embedder, vectors)
    asked: dict[str, list[Asked]] = {}
    for name, count in plan.counts.items():
        notify(f"looking up {name}")
        among = bases[SETS[name]]
        drawn = questions(name, among, count, tokenizer.encode, plan.seed)
        rows: Sequence[Sequence[int]] = [()] * len(drawn)
        if drawn and SETS[name] != CLOSED:
            rows = among.search(embedder.encode([q.prompt for q in drawn]), min(CANDIDATES, len(among)))
        asked[name] = [_asked(q, row, among, tokenizer) for q, row in zip(drawn, rows, strict=True)]
    kept = {which: TokenLists.of(among.tokens) for which, among in bases.items() if which != CLOSED}
    return Prepared(tokenizer.hash, span, plan.seed, kept, asked)


def _asked(question: Question, row: Sequence[int], among: References, tokenizer: Tokenizer) -> Asked:
    """Without references that say what is asked (equation 6, above 2/3)."""
    prompt = tokenizer.encode(question.prompt)
    found = [int(n) for n in row if overlap(prompt, among.tokens[n], EVALUATION_LIMIT) <= EVALUATION_LIMIT]
    gold, related = ((), ()) if SETS[question.set] == CLOSED else (question.gold, question.related)
    answer = tokenizer.encode(" " + question.answer)
    return Asked(question.set, question.id, tuple(prompt), tuple(answer), question.answers, gold, related, tuple(found))
