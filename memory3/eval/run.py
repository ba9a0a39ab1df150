"""Asks every question in every way, and keeps each answer on disk: a killed evaluation goes on where it stopped.

FOLDER/settings.json    what the answers depend on; another setting in the same folder is refused
      /results.jsonl    one line per question and arm
      /vectors/         embeddings of the references; codecs/ codebooks that arms asked for
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bank.codec import Codec, train_codec
from ..config import MemoryConfig
from ..embed import SupportsEncode
from ..memory import Memory
from ..model.llama import Llama
from ..model.tokenizer import Tokenizer
from ..train.batch import Piece, Sample
from ..train.overlap import EVALUATION_LIMIT, overlap
from .answer import Answerer
from .arms import Arm
from .scores import exact_match, f1
from .sets import SETS, Question, References, questions, references
from .writing import Writer

BATCH = 8  # questions of one forward pass
CANDIDATES = 24
CODEC_REFERENCES = 48

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Reader:
    """Weights that read, and those that write for them: with a "frozen" adapter those of the checkpoint."""

    net: Llama
    writer: Llama


@dataclass(frozen=True)
class Plan:
    """How much is asked: questions per set; of each set the first `generate` are also answered in words."""

    counts: Mapping[str, int]
    generate: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.counts) - set(SETS))
        if unknown:
            raise ValueError(f"sets: expected some of {', '.join(SETS)}, got {unknown}")


class Evaluation:
    """Everything that is the same for all arms: readers by name, tokenizer, embedder, references, questions."""

    def __init__(
        self,
        readers: Mapping[str, Reader],
        tokenizer: Tokenizer,
        embedder: SupportsEncode,
        plan: Plan,
        folder: Path,
        *,
        codecs: Sequence[Codec] = (),
        about: Mapping[str, Any] | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.readers, self.tokenizer, self.plan, self.folder = readers, tokenizer, plan, folder
        self._codecs: dict[str, Codec] = {c.spec.text: c for c in codecs}
        self._writers: dict[tuple, Writer] = {}
        self._answerers: dict[tuple, Answerer] = {}
        notify = notify or (lambda what: None)
        span = next(iter(readers.values())).net.memory.span
        encode = tokenizer.encode_reference
        folder.mkdir(parents=True, exist_ok=True)
        self._settle({**(about or {}), "seed": plan.seed})
        self.among: dict[str, References] = {}
        for which in dict.fromkeys(SETS[name] for name in plan.counts):
            notify(f"embedding the {which} references")
            self.among[which] = references(which, encode, span).embed(embedder, folder / "vectors")
        self.asked: dict[str, list[Question]] = {}
        self.found: dict[str, list[list[int]]] = {}
        for name, count in plan.counts.items():
            notify(f"looking up {name}")
            among = self.among[SETS[name]]
            asked = questions(name, among, count, tokenizer.encode, plan.seed)
            self.asked[name] = asked
            vectors = embedder.encode([q.prompt for q in asked]) if asked else np.zeros((0, 1), np.float32)
            rows = among.search(vectors, min(CANDIDATES, len(among))) if asked else []
            self.found[name] = [self._kept(q, row, among) for q, row in zip(asked, rows, strict=True)]
        self.results: dict[tuple[str, str, str], dict[str, Any]] = {}
        if (folder / "results.jsonl").is_file():
            for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a killed run
                    continue
                self.results[row["arm"], row["set"], row["id"]] = row

    def _settle(self, settings: Mapping[str, Any]) -> None:
        """Compare with what the folder was begun with; readers may be added, as answers are kept by reader."""
        file = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            readers = {**before.get("readers", {}), **settings.get("readers", {})}
            changed = {**before, "readers": readers} != {**before, **settings, "readers": readers}
            if changed or any(readers[name] != value for name, value in before.get("readers", {}).items()):
                raise ValueError(f"{self.folder} holds answers of other weights or another seed; give another folder")
            settings = {**settings, "readers": readers}
        file.write_text(json.dumps(settings, sort_keys=True, indent=1) + "\n", encoding="utf-8")

    def _kept(self, question: Question, row: Sequence[int], among: References) -> list[int]:
        """What was found, without references that say what is asked (equation 6, above 2/3)."""
        ids = self.tokenizer.encode(question.prompt)
        return [int(n) for n in row if overlap(ids, among.tokens[n], EVALUATION_LIMIT) <= EVALUATION_LIMIT]

    # ---- which references -------------------------------------------------------------------------------------------

    def reads(self, arm: Arm, question: Question, found: Sequence[int]) -> list[int]:
        """Numbers of the references an arm reads for a question, most similar first."""
        among = self.among[SETS[question.set]]
        rng = random.Random(f"{self.plan.seed} {arm.choose} {question.id}")

        def others(count: int) -> list[int]:
            out: list[int] = []
            while len(out) < count:
                number = rng.randrange(len(among))
                if number not in question.related and number not in out:
                    out.append(number)
            return out

        if arm.choose == "random":
            return others(arm.refs)
        reads = [n for n in found if arm.choose == "found" or n not in question.related][: arm.refs]
        replaced = rng.sample(range(len(reads)), round(arm.noise * len(reads)))
        for place, number in zip(replaced, others(len(replaced)), strict=True):
            reads[place] = number
        return reads

    # ---- asking -----------------------------------------------------------------------------------------------------

    def todo(self, arms: Sequence[Arm]) -> int:
        """Answers that are missing."""
        return sum(len(self._missing(arm, name, part)) for name, part, _ in self._parts() for arm in arms)

    def run(self, arms: Sequence[Arm], tick: Tick = lambda done: None) -> list[dict[str, Any]]:
        """Ask what is missing; all arms of a question before the next, so that a stopped evaluation is paired too.

        Returns one dict per answer: arm, set, id, loss (nats), tokens, gold (whether the answer's reference was read),
        and said, em, f1 where it was answered in words.
        """
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            for name, part, found in self._parts():
                for arm in arms:
                    missing = self._missing(arm, name, part)
                    for row in self._ask(arm, [part[i] for i in missing], [found[i] for i in missing]):
                        self.results[row["arm"], row["set"], row["id"]] = row
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    tick(len(missing))
        names = {arm.name for arm in arms}
        asked = {(q.set, q.id) for part in self.asked.values() for q in part}
        return [row for (arm, name, id_), row in self.results.items() if arm in names and (name, id_) in asked]

    def _parts(self) -> Iterator[tuple[str, list[Question], list[list[int]]]]:
        """Batches, the sets in turns: whatever is done when an evaluation stops is about all of them."""
        longest = max(map(len, self.asked.values()), default=0)
        for start in range(0, longest, BATCH):
            for name, asked in self.asked.items():
                if asked[start : start + BATCH]:
                    yield name, asked[start : start + BATCH], self.found[name][start : start + BATCH]

    def _missing(self, arm: Arm, name: str, part: Sequence[Question]) -> list[int]:
        if arm.limit:
            allowed = {q.id for q in self.asked[name][: arm.limit]}
            part = [q if q.id in allowed else None for q in part]
        return [i for i, q in enumerate(part) if q is not None and (arm.name, name, q.id) not in self.results]

    def _ask(self, arm: Arm, asked: Sequence[Question], found: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        if not asked:
            return []
        among = self.among[SETS[asked[0].set]]
        reader = self.readers[arm.reader]
        memory = replace(reader.net.memory, **arm.memory)
        answerer = self._answerer(arm.reader, memory)
        reads = [self.reads(arm, q, f) if arm.read != "none" else [] for q, f in zip(asked, found, strict=True)]
        samples = [self._sample(q, arm.read, r, memory, among) for q, r in zip(asked, reads, strict=True)]
        loaded = None
        if arm.read == "memory":
            loaded = self._writer(arm, memory, among)([n for row in reads for n in row])
        losses = answerer.losses(samples, loaded)
        rows = []
        for q, sample, read, loss in zip(asked, samples, reads, losses, strict=True):
            gold = any(n in q.gold for n in read)
            tokens = len(sample.ids) - sample.first
            rows.append({"arm": arm.name, "set": q.set, "id": q.id, "loss": loss, "tokens": tokens, "gold": gold})
        first = {q.id for q in self.asked[asked[0].set][: self.plan.generate]}
        spoken = [i for i, q in enumerate(asked) if q.id in first]
        if spoken:
            texts = answerer.texts([samples[i] for i in spoken], loaded)
            for i, said in zip(spoken, texts, strict=True):
                answers = asked[i].answers
                rows[i] |= {"said": said, "em": exact_match(said, answers), "f1": f1(said, answers)}
        return rows

    def _sample(self, q: Question, read: str, reads: Sequence[int], memory: MemoryConfig, among: References) -> Sample:
        """As memory3.train.qa.Reader makes them: text stands in front as it is written, most similar last."""
        front: list[int] = []
        if read == "text":
            for number in reversed(reads):
                front += [*memory.prefix_ids, *among.tokens[number][: memory.span]]
        prompt = self.tokenizer.encode(q.prompt)
        ids = (*front, *memory.context_bos_ids, *prompt, *self.tokenizer.encode(" " + q.answer))
        first = len(front) + len(memory.context_bos_ids) + len(prompt)
        return Sample(ids, first, (Piece(len(ids), tuple(reads)),) if read == "memory" else ())

    # ---- who reads and who writes -----------------------------------------------------------------------------------

    def _answerer(self, name: str, memory: MemoryConfig) -> Answerer:
        key = name, memory
        if key not in self._answerers:
            self._answerers[key] = Answerer(self.readers[name].net.with_memory(memory), self.tokenizer)
        return self._answerers[key]

    def _writer(self, arm: Arm, memory: MemoryConfig, among: References) -> Writer:
        writer = self.readers[arm.reader].writer
        key = id(writer), memory, id(among), arm.codec, arm.refit
        if key not in self._writers:
            net = writer.with_memory(memory)
            codec = self._codec(arm.codec, net, memory) if arm.codec else None
            plain = self._writer(replace(arm, codec=None), memory, among) if arm.codec else None
            self._writers[key] = Writer(net, among, codec, arm.refit, plain)
        return self._writers[key]

    def _codec(self, spec: str, net: Llama, memory: MemoryConfig) -> Codec:
        """Books given, or trained once on references drawn by seed and kept in FOLDER/codecs."""
        if spec in self._codecs:
            return self._codecs[spec]
        made_of = hashlib.sha256(f"{spec} {memory} {self.plan.seed}".encode()).hexdigest()[:16]
        file = self.folder / "codecs" / f"{made_of}.bin"
        if not file.is_file():
            among = next(iter(self.among.values()))
            rng = random.Random(f"{self.plan.seed} codec")
            loaded = Writer(net, among)(rng.sample(range(len(among)), min(CODEC_REFERENCES, len(among))))
            memories = [Memory(kv, n_valid=int(n)) for kv, n in zip(loaded.kv, loaded.length, strict=True)]
            codec = train_codec(spec, memories, max_vectors=40_000, seed=self.plan.seed)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(codec.to_bytes())
        return Codec.from_bytes(file.read_bytes())
