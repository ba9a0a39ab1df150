"""Asks every question in every way, and keeps each answer on disk: a killed evaluation goes on where it stopped.

FOLDER/settings.json    what the answers depend on; another setting in the same folder is refused
      /results.jsonl    one line per question and arm; of two lines the later one counts
      /vectors/         embeddings of the references; codecs/ codebooks that arms asked for
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..bank.codec import Codec, train_codec
from ..config import MemoryConfig
from ..memory import Memory
from ..model.llama import Llama
from ..model.tokenizer import Tokenizer
from ..train.batch import Piece, Sample
from .answer import Answerer
from .arms import Arm, Reader
from .prepared import Asked, Prepared
from .quantise import needed, train
from .scores import exact_match, f1
from .sets import CLOSED, SETS
from .writing import Writer

PART = {"cpu": 32, "cuda": 1 << 20}  # questions of a set that all arms answer before the next
BATCH = {"cpu": (32, 4096), "cuda": (512, 1 << 16)}  # most questions and tokens of one forward pass
TRAINED_ON = {"cpu": (48, 40_000), "cuda": (256, 200_000)}  # references and vectors of codebooks
PASSING_BYTES = {"cpu": 1 << 29, "cuda": 6 << 30}  # of memories that are not what weights read by themselves
DIGITS = 5  # of losses on disk

Tick = Callable[[int], None]
Row = dict[str, Any]


class Evaluation:
    """Prepared questions and the weights that answer them, by name; "original" is the checkpoint.

    generate   questions of each set, from the first, that are also answered in words
    codecs     books for memories that "original" writes with its own memory configuration
    until      no batch is begun after this time.monotonic()
    """

    def __init__(
        self,
        prepared: Prepared,
        readers: Mapping[str, Reader],
        tokenizer: Tokenizer,
        folder: Path,
        *,
        generate: int = 100,
        codecs: Sequence[Codec] = (),
        about: Mapping[str, Any] | None = None,
        until: float | None = None,
    ) -> None:
        first = next(iter(readers.values())).net
        self.prepared = prepared.check(tokenizer, first.memory.span)
        self.readers, self.tokenizer, self.folder = readers, tokenizer, folder
        self.device, self.until = first.embed.device.type, until
        self._spoken = {(q.set, q.id) for part in prepared.asked.values() for q in part[:generate]}
        self._codecs: dict[str, Codec] = {c.spec.text: c for c in codecs}
        self._writers: dict[tuple, Writer] = {}
        self._answerers: dict[tuple, Answerer] = {}
        self.results: dict[tuple[str, str, str], Row] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._settle({**(about or {}), "seed": prepared.seed})
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

    # ---- which references -------------------------------------------------------------------------------------------

    def reads(self, arm: Arm, question: Asked) -> list[int]:
        """Numbers of the references an arm reads for a question, most similar first."""
        if arm.read == "none":
            return []
        count = len(self.prepared.among[SETS[question.set]])
        rng = random.Random(f"{self.prepared.seed} {arm.choose} {question.id}")

        def others(wanted: int) -> list[int]:
            out: list[int] = []
            while len(out) < wanted:
                number = rng.randrange(count)
                if number not in question.related and number not in out:
                    out.append(number)
            return out

        if arm.choose == "random":
            return others(arm.refs)
        reads = [n for n in question.found if arm.choose == "found" or n not in question.related][: arm.refs]
        replaced = rng.sample(range(len(reads)), round(arm.noise * len(reads)))
        for place, number in zip(replaced, others(len(replaced)), strict=True):
            reads[place] = number
        return reads

    # ---- asking -----------------------------------------------------------------------------------------------------

    def todo(self, arms: Sequence[Arm], words: bool = True) -> int:
        """Answers that are missing."""
        return sum(len(self._missing(arm, part, words)) for part in self._parts() for arm in arms)

    def run(
        self,
        arms: Sequence[Arm],
        tick: Tick = lambda done: None,
        words: bool = True,
        coming: Sequence[Arm] = (),
    ) -> list[Row]:
        """Ask what is missing; all arms of a part before the next, so that a stopped evaluation is paired too.

        words: answer in words, too, where that is due. coming: arms of later calls, whose memories are kept.
        Returns one dict per answer: arm, set, id, loss (nats), tokens, gold (whether the answer's reference was read),
        and said, em, f1 where it was answered in words.
        """
        parts = list(self._parts())
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            for part in parts:
                for i, arm in enumerate(arms):
                    missing = self._missing(arm, part, words)
                    for batch in self._batches(arm, missing):
                        if self.until is not None and time.monotonic() > self.until:
                            return self._of(arms)
                        self._ask(arm, batch, words, file)
                        tick(len(batch))
                    if len(parts) == 1:
                        self._forget([*arms[i + 1 :], *coming])
        return self._of(arms)

    def _of(self, arms: Iterable[Arm]) -> list[Row]:
        keys = ((arm.name, q.set, q.id) for arm in arms for part in self.prepared.asked.values() for q in part)
        return [self.results[key] for key in keys if key in self.results]

    def _parts(self) -> Iterator[list[Asked]]:
        """The sets in turns: whatever is done when an evaluation stops is about all of them."""
        size, asked = PART[self.device], self.prepared.asked
        if size >= max(map(len, asked.values()), default=0):
            yield [q for part in asked.values() for q in part]
            return
        for start in range(0, max(map(len, asked.values())), size):
            yield from (part[start : start + size] for part in asked.values() if part[start : start + size])

    def _missing(self, arm: Arm, part: Sequence[Asked], words: bool) -> list[Asked]:
        """Of a part, what has no loss yet, or has to be answered in words."""
        out = []
        allowed: dict[str, set[str]] = {}
        for q in part:
            if q.set not in allowed:
                every = self.prepared.asked[q.set]
                allowed[q.set] = {q.id for q in every[: arm.limit or len(every)]}
            if q.id not in allowed[q.set] or (SETS[q.set] == CLOSED and arm.read != "none"):
                continue
            row = self.results.get((arm.name, q.set, q.id))
            if row is None or (words and "said" not in row and (q.set, q.id) in self._spoken):
                out.append(q)
        return out

    def _batches(self, arm: Arm, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Questions among the same references, as many as one forward pass takes."""
        most, tokens = BATCH[self.device]
        span = self.readers[arm.reader].net.memory.span
        out: list[Asked] = []
        rows = 0
        for q in asked:
            own = len(q.prompt) + len(q.answer) + 4 + (arm.refs * (span + 4) if arm.read == "text" else 0)
            if out and (len(out) == most or rows + own > tokens or SETS[q.set] != SETS[out[0].set]):
                yield out
                out, rows = [], 0
            out.append(q)
            rows += own
        if out:
            yield out

    def _ask(self, arm: Arm, asked: Sequence[Asked], words: bool, file: TextIO) -> None:
        reader = self.readers[arm.reader]
        memory = replace(reader.net.memory, **arm.memory)
        answerer = self._answerer(arm.reader, memory)
        reads = [self.reads(arm, q) for q in asked]
        samples = [self._sample(q, arm.read, r, memory) for q, r in zip(asked, reads, strict=True)]
        loaded = None
        if arm.read == "memory":
            loaded = self._writer(arm, memory, SETS[asked[0].set])([n for row in reads for n in row])
        rows = [self.results.get((arm.name, q.set, q.id)) for q in asked]
        if None in rows:
            rows = []
            for q, sample, read, loss in zip(asked, samples, reads, answerer.losses(samples, loaded), strict=True):
                gold, tokens = any(n in q.gold for n in read), len(sample.ids) - sample.first
                rows.append({"arm": arm.name, "set": q.set, "id": q.id, "loss": round(loss, DIGITS),
                             "tokens": tokens, "gold": gold})  # fmt: skip
        spoken = [i for i, q in enumerate(asked) if words and (q.set, q.id) in self._spoken]
        if spoken:
            texts = answerer.texts([samples[i] for i in spoken], loaded)
            for i, said in zip(spoken, texts, strict=True):
                answers = asked[i].answers
                rows[i] = {**rows[i], "said": said, "em": exact_match(said, answers), "f1": f1(said, answers)}
        for row in rows:
            self.results[row["arm"], row["set"], row["id"]] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    def _sample(self, q: Asked, read: str, reads: Sequence[int], memory: MemoryConfig) -> Sample:
        """As memory3.train.qa.Reader makes them: text stands in front as it is written, most similar last."""
        front: list[int] = []
        if read == "text":
            among = self.prepared.among[SETS[q.set]]
            for number in reversed(reads):
                front += [*memory.prefix_ids, *among[number][: memory.span]]
        ids = (*front, *memory.context_bos_ids, *q.prompt, *q.answer)
        return Sample(ids, len(ids) - len(q.answer), (Piece(len(ids), tuple(reads)),) if read == "memory" else ())

    # ---- who reads and who writes -----------------------------------------------------------------------------------

    def _answerer(self, name: str, memory: MemoryConfig) -> Answerer:
        key = name, memory
        if key not in self._answerers:
            self._answerers[key] = Answerer(self.readers[name].net.with_memory(memory), self.tokenizer)
        return self._answerers[key]

    def _writer(self, arm: Arm, memory: MemoryConfig, which: str) -> Writer:
        key = self._writer_key(arm, memory, which)
        if key not in self._writers:
            reader = self.readers[arm.reader]
            net, codec, plain = reader.writer.with_memory(memory), None, None
            if arm.codec:
                codec = self._codec(arm, memory)
                plain = self._writer(replace(arm, codec=None), memory, which)
            elif not arm.refit and self._part_of(memory, reader.net.memory):
                plain = self._writer(arm, reader.net.memory, which)
            passing = codec is not None or arm.refit or memory != reader.net.memory
            kept = PASSING_BYTES[self.device] if passing else None
            self._writers[key] = Writer(net, self.prepared.among[which], codec, arm.refit, plain, kept)
        return self._writers[key]

    def _writer_key(self, arm: Arm, memory: MemoryConfig, which: str) -> tuple:
        return id(self.readers[arm.reader].writer), memory, which, arm.codec, arm.refit

    @staticmethod
    def _part_of(memory: MemoryConfig, whole: MemoryConfig) -> bool:
        """Whether memories are others with layers and heads left out."""
        fewer = set(memory.layers) <= set(whole.layers) and whole.head_map is None
        return memory != whole and fewer and replace(memory, layers=whole.layers, head_map=None) == whole

    def _forget(self, coming: Sequence[Arm]) -> None:
        """Let go of memories that no coming arm reads."""
        needed = set()
        for arm in coming:
            own = self.readers[arm.reader].net.memory
            for memory, codec in ((replace(own, **arm.memory), arm.codec), (own, None)):
                for which in self.prepared.among:
                    needed.add(self._writer_key(replace(arm, codec=codec), memory, which))
        self._writers = {key: writer for key, writer in self._writers.items() if key in needed}

    def _codec(self, arm: Arm, memory: MemoryConfig) -> Codec:
        """Books given, or trained once on references drawn by seed and kept in FOLDER/codecs."""
        spec, base, writer = arm.codec, self.readers.get("original"), self.readers[arm.reader].writer
        frozen = base is not None and writer is base.writer
        if spec in self._codecs and frozen and memory == base.net.memory:
            return self._codecs[spec]
        made_by = "original" if frozen else arm.reader
        made_of = hashlib.sha256(f"{spec} {memory} {made_by} {self.prepared.seed}".encode()).hexdigest()[:16]
        file = self.folder / "codecs" / f"{made_of}.bin"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(self._trained(spec, writer.with_memory(memory)).to_bytes())
        return Codec.from_bytes(file.read_bytes())

    def _trained(self, spec: str, net: Llama) -> Codec:
        count, most = TRAINED_ON[self.device]
        among = next(iter(self.prepared.among.values()))
        rng = random.Random(f"{self.prepared.seed} codec")
        drawn = rng.sample(range(len(among)), min(count, len(among)))
        loaded = Writer(net, among, kept=0)(drawn)
        if needed(self.device):
            return train(spec, loaded, most, self.prepared.seed)
        memories = [Memory(loaded.kv[s], n_valid=int(loaded.length[s])) for s in loaded.slot.values()]
        return train_codec(spec, memories, max_vectors=most, seed=self.prepared.seed)
