"""Questions made from references without a model, for tuning: whatever a bank holds can be asked about.

fact       fields of the factbook by template, and the first sentence of an article ("What is X? X is ...")
reverse    a definition asked backwards: "What is a device that ...?" X
cloze      a sentence whose number, year or name is replaced by a question word: "It opened in what year?" 1889
passage    a stretch of the reference itself, to be continued word for word
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..demo.questions import fact_question, sentence_question

KINDS = ("fact", "reverse", "cloze", "passage")
FORMATS = ("Question: {}\nAnswer:", "Q: {}\nA:", "{}\nAnswer:", "{}\n", "{}")
SENTENCE = re.compile(r"(?<=[a-z0-9)\]\"'][.!?])\s+(?=[\"'(]?[A-Z])")
_DEFINITION = re.compile(r"^(?P<name>[^.,;:(]{2,60}?)(?: \([^)]*\))? (?P<verb>is|are|was|were) (?P<rest>.{20,200})[.]$")
_YEAR = re.compile(r"\b(?P<lead>in|since|until|by|from|of) (?P<answer>1[0-9]{3}|20[0-2][0-9])\b")
_NUMBER = re.compile(r"\b(?P<answer>\d[\d,.]*\d|\d|two|three|four|five|six|seven|eight|nine|ten|twelve)(?= [a-z])")
_NAME = re.compile(r"(?<=[a-z,] )(?P<answer>[A-Z][\w'-]+(?: (?:of |the |de |von )?[A-Z][\w'-]+){0,3})")
_PERSON = re.compile(r"\b(?:by|with|named|called|son of|daughter of|married)\s+$")
_PLACE = re.compile(r"\b(?:in|at|near|from|to)\s+$")
MIN_SENTENCE, MAX_SENTENCE = 30, 240


@dataclass(frozen=True)
class Asked:
    """kind: one of KINDS; prompt: without the space that the answer begins with; answer: as it is scored and trained;
    stops: whether a line break ends it."""

    kind: str
    prompt: str
    answer: str
    stops: bool = True


def questions_about(title: str, text: str, source: str, rng: random.Random) -> Iterator[Asked]:
    """Questions that a reference answers, in no particular order; formats are drawn by `rng`."""
    known = fact_question(text, 0) if source == "factbook" else sentence_question(title, text, 0)
    if known is not None:
        if known.kind == "sentence" or rng.random() < 0.3:
            yield Asked("fact", known.prompt, known.answer)
        else:
            yield Asked("fact", _form(known.text, rng), known.answer)
    if source == "factbook":
        return
    continues = title and text.startswith(f"{title}: ")
    sentences = SENTENCE.split(text[len(title) + 2 :] if continues else text)
    for i, sentence in enumerate(sentences):
        if not MIN_SENTENCE <= len(sentence) <= MAX_SENTENCE or not sentence.endswith((".", '."')):
            continue
        if i == 0 and not continues and (asked := reverse(title, sentence)) is not None:
            yield Asked("reverse", _form(asked[0], rng), asked[1])
        if (asked := cloze(title, sentence, rng)) is not None:
            yield Asked("cloze", _form(asked[0], rng), asked[1])


def reverse(title: str, sentence: str) -> tuple[str, str] | None:
    """A definition as (question, what is defined), where the sentence begins with the title and is about it alone."""
    found = _DEFINITION.match(sentence)
    if found is None:
        return None
    name = re.sub(r"^(?:The|An?) ", "", found["name"])
    words = [w for w in re.findall(r"\w{4,}", title.lower())] or [title.lower()]
    if name.lower() != title.lower() or any(w in found["rest"].lower() for w in words):
        return None
    word = "Who" if re.search(r"\b(?:born|died|who)\b|\(\d{4}", sentence) else "What"
    return f"{word} {found['verb']} {found['rest']}?", name


def cloze(title: str, sentence: str, rng: random.Random) -> tuple[str, str] | None:
    """A sentence with one year, number or name replaced by a question word, and what stood there; drawn by `rng`.

    The title goes in front of a sentence that does not hold it: else nobody knows what it is about.
    """
    choices: list[tuple[int, int, str]] = []
    for m in _YEAR.finditer(sentence):
        choices.append((*m.span("answer"), "what year"))
    for m in _NUMBER.finditer(sentence):
        if not any(a <= m.start() < b for a, b, _ in choices):
            choices.append((*m.span("answer"), "how many"))
    for m in _NAME.finditer(sentence):
        before = sentence[: m.start()]
        word = "who" if _PERSON.search(before) else "where" if _PLACE.search(before) else "what"
        if m["answer"].lower() not in title.lower():
            choices.append((*m.span("answer"), "which place" if word == "where" else word))
    choices = [(a, b, w) for a, b, w in choices if sentence.count(sentence[a:b]) == 1]
    if not choices:
        return None
    start, end, word = rng.choice(choices)
    answer = sentence[start:end]
    question = f"{sentence[:start]}{word}{sentence[end:]}".rstrip(".\"' ") + "?"
    if title and title.lower() not in question.lower():
        if answer.lower() in title.lower():
            return None
        question = f"{title}: {question}"
    return question, answer


def passage(
    token_ids: list[int], rng: random.Random, prompt: int = 12, answer: int = 24
) -> tuple[list[int], list[int]]:
    """A stretch of a reference as (given tokens, tokens to be continued); two empty lists where it is too short."""
    room = len(token_ids) - prompt - answer
    if room < 4:
        return [], []
    start = rng.randrange(room + 1)
    return token_ids[start : start + prompt], token_ids[start + prompt : start + prompt + answer]


def _form(question: str, rng: random.Random) -> str:
    return rng.choice(FORMATS).format(question)
