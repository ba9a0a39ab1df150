"""Invented people for the controlled study: names, facts, references in one wording, statements in another.

A name is two words; each of four fields has a value. Four groups share no name: `held` are in no training text, `read`
recur in it and can be read about, `closed` recur and never come with a reference, and everybody else is a stranger
whose facts are drawn anew at every meeting: they cannot be learned by heart, only read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .batch import Piece, Sample

PREFIX, BOS = 1, 2
FIELDS, VALUES, WORDS = 4, 40, 20
ASKS = 8  # words that ask for a field; the four after them tell it in a reference
TELLS = ASKS + FIELDS
FILLER = TELLS + FIELDS
VALUE = FILLER + WORDS
NAME = VALUE + FIELDS * VALUES
CLOSED, KNOWN = 0.25, 0.25  # shares of the training text, see Statements
STATED = 10  # most statements of a training sequence


class Meeting(NamedTuple):
    """People of B sequences: names int64 [B, R, 2] and values int64 [B, R, FIELDS], as tokens."""

    names: np.ndarray
    values: np.ndarray


class Invented:
    """Who there is.

    syllables   first words of a name, and as many second words: syllables ** 2 names
    group       people in each of the groups `held`, `read` and `closed`
    refs        people of a sequence, and references that it reads
    fillers     words that say nothing behind each fact in a reference
    """

    def __init__(self, syllables: int = 256, group: int = 1024, refs: int = 5, fillers: int = 1, seed: int = 0) -> None:
        if 4 * group > syllables**2:
            raise ValueError(f"group: expected at most {syllables**2 // 4} of {syllables**2} names, got {group}")
        rng = np.random.default_rng([seed, 0])
        self.syllables, self.group, self.refs, self.fillers = syllables, group, refs, fillers
        self._codes = rng.permutation(syllables**2)  # of the three groups, then of the strangers
        self._facts = rng.integers(0, VALUES, (3 * group, FIELDS))

    @property
    def length(self) -> int:
        """Tokens of a reference."""
        return 2 + FIELDS * (2 + self.fillers)

    @property
    def vocabulary(self) -> int:
        return NAME + 2 * self.syllables

    def meet(self, who: np.ndarray, rng: np.random.Generator) -> Meeting:
        """People by number: held from 0, read from `group`, closed from 2 * `group`, strangers from 3 * `group`."""
        codes = self._codes[who]
        names = np.stack((codes // self.syllables, self.syllables + codes % self.syllables), axis=-1) + NAME
        facts = rng.integers(0, VALUES, (*who.shape, FIELDS))
        known = who < 3 * self.group
        facts[known] = self._facts[who[known]]
        return Meeting(names, facts + VALUE + VALUES * np.arange(FIELDS))

    def references(self, people: Meeting, rng: np.random.Generator) -> np.ndarray:
        """int64 [B, R, length]: "first last", then per field, in any order, "tells value" and the fillers."""
        order = rng.permuted(np.broadcast_to(np.arange(FIELDS), people.values.shape), axis=-1)
        fillers = rng.integers(FILLER, VALUE, (*order.shape, self.fillers))
        told = np.stack((TELLS + order, np.take_along_axis(people.values, order, -1)), axis=-1)
        facts = np.concatenate((told, fillers), axis=-1)
        return np.concatenate((people.names, facts.reshape(*order.shape[:2], -1)), axis=-1)

    def statements(self, people: Meeting, told: np.ndarray) -> np.ndarray:
        """int64 [B, 4 n]: "first last asks value" for told int64 [B, n], person * FIELDS + field."""
        person, field = told // FIELDS, told % FIELDS
        row = np.arange(len(told))[:, None]
        words = (
            people.names[row, person, 0],
            people.names[row, person, 1],
            ASKS + field,
            people.values[row, person, field],
        )
        return np.stack(words, axis=-1).reshape(len(told), -1)


def record(reference: np.ndarray) -> bytes:
    """Id of a reference: its tokens."""
    return reference.astype(np.uint16).tobytes()


def tokens(record: bytes) -> list[int]:
    """Inverse of `record`."""
    return np.frombuffer(record, np.uint16).tolist()


def samples(statements: np.ndarray, references: np.ndarray, read: str, first: int) -> list[Sample]:
    """Sequences that read their references as "memory", as "text" in front, or none ("nothing": in memory mode).

    statements int64 [B, n], of which those from `first` on are predicted; references int64 [B, R, length].
    """
    count, refs, _ = references.shape
    opening = np.full((count, 1), BOS)
    if read == "text":
        told = np.concatenate((np.full((count, refs, 1), PREFIX), references), axis=-1).reshape(count, -1)
        opening = np.concatenate((told, opening), axis=1)
    rows = np.concatenate((opening, statements), axis=1).tolist()
    first += opening.shape[1]
    if read in ("none", "text"):
        return [Sample(tuple(ids), first) for ids in rows]
    reads = [tuple(map(record, own)) if read == "memory" else () for own in references]
    return [Sample(tuple(ids), first, (Piece(len(ids), r),)) for ids, r in zip(rows, reads, strict=True)]


class Statements:
    """Training sequences: up to STATED statements about a few people, who are read about as `first` says up to step
    `begin` and as `read` says from there on.

    CLOSED of the sequences are about people of the group `closed` and read nothing, in every run; KNOWN of the people
    in the others belong to the group `read`, the rest are strangers.
    """

    def __init__(self, people: Invented, first: str, read: str, begin: int, batch: int, seed: int) -> None:
        self.people, self.first, self.read, self.begin = people, first, read, begin
        self.batch, self.seed = batch, seed

    def samples(self, step: int) -> list[Sample]:
        people, group, closed = self.people, self.people.group, round(CLOSED * self.batch)
        refs = people.refs
        rng = np.random.default_rng([self.seed, 1, step])
        who = rng.integers(3 * group, people.syllables**2, (self.batch, refs))
        known = rng.random(who.shape) < KNOWN
        who[known] = rng.integers(group, 2 * group, int(known.sum()))
        who[:closed] = rng.integers(2 * group, 3 * group, (closed, refs))
        met = people.meet(who, rng)
        facts = rng.permuted(np.broadcast_to(np.arange(refs * FIELDS), (self.batch, refs * FIELDS)), axis=1)
        told, references = people.statements(met, facts[:, :STATED]), people.references(met, rng)
        alone = "nothing" if self.read == "memory" else "none"
        read = self.read if step >= self.begin else self.first
        return [
            *samples(told[:closed], references[:closed], alone, 0),
            *samples(told[closed:], references[closed:], read, 0),
        ]


def questions(people: Invented, whom: range, read: str, seed: int = 0) -> list[Sample]:
    """A question about each person, the value predicted; the person's reference is one of those read."""
    rng = np.random.default_rng([seed, 2, whom.start])
    count = np.arange(len(whom))
    place, field = rng.integers(0, people.refs, len(whom)), rng.integers(0, FIELDS, len(whom))
    who = whom.start + (count[:, None] + rng.integers(1, len(whom), (len(whom), people.refs))) % len(whom)
    who[count, place] = whom
    met = people.meet(who, rng)
    told, references = people.statements(met, (place * FIELDS + field)[:, None]), people.references(met, rng)
    return samples(told, references, read, 3)
