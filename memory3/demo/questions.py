"""Questions whose answers stand in a reference: country facts with a short value, and "What is X?" with a sentence.

Entries come from the bank's own texts and are drawn by seed, so a question's reference is known (its gold reference).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Field of the factbook, where its value stands, the question, and the words its answer begins with.
FACTS = (
    ("Capital", r"\bname: ([^;:()\[\]]{2,40}?) *(?:;|\(|$)", "What is the capital of {}?", "The capital of {} is"),
    (
        "Elevation",
        r"highest point: ([^;]{3,40}?) -?[\d,.]+",
        "What is the highest point of {}?",
        "The highest point of {} is",
    ),
    ("Coastline", r": ([\d,.]+ km)", "How long is the coastline of {}?", "The coastline of {} is"),
    ("Median age", r"total: ([\d.]+ years)", "What is the median age in {}?", "The median age in {} is"),
    ("Population", r"total: ([\d,]{5,})", "What is the population of {}?", "The population of {} is"),
    (
        "National anthem(s)",
        r'title: "([^"]{3,60})"',
        "What is the title of the national anthem of {}?",
        "The national anthem of {} is",
    ),
    ("National symbol(s)", r": ([^,;(]{3,40})", "What is a national symbol of {}?", "A national symbol of {} is the"),
    ("Government type", r": ([^;(]{5,60})", "What type of government does {} have?", "The government of {} is a"),
    (
        "Internet country code",
        r": (\.[a-z]{2})\b",
        "What is the internet country code of {}?",
        "The internet country code of {} is",
    ),
    (
        "Exports - partners",
        r": ([A-Z][A-Za-z ]+) \d+%",
        "Which country is the largest export partner of {}?",
        "The largest export partner of {} is",
    ),
    (
        "Imports - partners",
        r": ([A-Z][A-Za-z ]+) \d+%",
        "Which country is the largest import partner of {}?",
        "The largest import partner of {} is",
    ),
    (
        "Exports - commodities",
        r": ([^,;(]{3,40}),",
        "What is the main export commodity of {}?",
        "The main export commodity of {} is",
    ),
    ("Major aquifers", r": ([^,;(]{3,40})", "What is a major aquifer of {}?", "A major aquifer of {} is the"),
    ("Irrigated land", r": ([\d,.]+ sq km)", "How much land is irrigated in {}?", "The irrigated land in {} is"),
    (
        "Life expectancy at birth",
        r"total population: ([\d.]+ years)",
        "What is the life expectancy in {}?",
        "The life expectancy in {} is",
    ),
    ("Airports", r": ([\d,]+)", "How many airports does {} have?", "The number of airports in {} is"),
    (
        "Unemployment rate",
        r"rate 2024: ([\d.]+%)",
        "What was the unemployment rate of {} in 2024?",
        "The unemployment rate of {} in 2024 was",
    ),
)
_HEAD = re.compile(r"^(?P<country>[^:]+?) - (?P<field>.+?): ")
# A first sentence in two parts: up to its verb, which the prompt gives away, and the rest, which is the answer.
_SENTENCE = re.compile(
    r"^(?P<stem>[^.]{3,90}?\b(?:is|was|are|were)) (?P<rest>.{20,220}?[a-z)\]\"'0-9]{2}\.)(?= [A-Z]|$)"
)


@dataclass(frozen=True)
class Question:
    """kind "fact" (answer: a short value) or "sentence" (the rest of one); stem: how the answer begins, as given in the
    prompt; gold: number of its reference in the list drawn from."""

    kind: str
    text: str
    stem: str
    answer: str
    gold: int

    @property
    def prompt(self) -> str:
        return f"{self.text} {self.stem}"


def fact_question(text: str, gold: int) -> Question | None:
    """A question about a factbook reference, or None where no pattern fits."""
    head = _HEAD.match(text)
    if head is None or not re.fullmatch(r"[A-Z][\w .,'-]+", head["country"]):
        return None
    for field, pattern, question, stem in FACTS:
        if head["field"] == field and (found := re.search(pattern, text[head.end() - 2 :])):
            value = found[1].strip()
            if value.startswith(("unnamed", "none", "0 ")) or value in ("0", "NA"):
                return None
            country = head["country"]
            return Question("fact", question.format(country), stem.format(country), value, gold)
    return None


def sentence_question(title: str, text: str, gold: int) -> Question | None:
    """ "What is TITLE?", answered by the first sentence of its reference."""
    found = _SENTENCE.match(text)
    continues = text.startswith(f"{title}: ")  # a later piece of a long article opens with its title
    if found is None or continues or title.split()[0].lower() not in found["stem"].lower():
        return None
    return Question("sentence", f"What is {title}?", found["stem"], found["rest"], gold)


def draw(references: Iterable[tuple[str, str, str]], count: int, seed: int) -> list[Question]:
    """`count` questions, half of each kind, about (title, text, source) references, reproducible by `seed`.

    Raises:
        ValueError: the references give fewer questions.
    """
    pools: dict[str, list[Question]] = {"fact": [], "sentence": []}
    asked: dict[str, int] = {}
    for gold, (title, text, source) in enumerate(references):
        question = fact_question(text, gold) if source == "factbook" else sentence_question(title, text, gold)
        if question is not None:
            pools[question.kind].append(question)
            asked[question.text] = asked.get(question.text, 0) + 1
    rng = random.Random(seed)
    chosen: list[Question] = []
    for kind, pool in pools.items():
        unique = [q for q in pool if asked[q.text] == 1]  # a question with two answers is no question
        want = count // 2 if kind == "fact" else count - count // 2
        if len(unique) < want:
            raise ValueError(f"questions: {want} of kind {kind} asked for, the references give {len(unique)}; use more")
        chosen += rng.sample(unique, want)
    rng.shuffle(chosen)
    return chosen


_WORD = re.compile(r"[a-z0-9]+(?:[.,][0-9]+)*")
_STOP = frozenset("a an the of in on at to and or is was were are be by for from with as that which it its".split())


def is_hit(question: Question, text: str) -> bool:
    """Whether an answer counts: a fact's value appears in it; of a sentence, at least half of its content words do."""
    said = text.lower()
    if question.kind == "fact":
        return question.answer.lower() in said
    wanted = {w for w in _WORD.findall(question.answer.lower()) if w not in _STOP}
    wanted -= set(_WORD.findall(question.prompt.lower()))  # repeating the prompt earns nothing
    return bool(wanted) and len(wanted & set(_WORD.findall(said))) * 2 >= len(wanted)
