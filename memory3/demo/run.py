"""Writes the demo's bank, asks its questions three ways and reports."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import data
from ..bank import Bank
from ..bank.build import build_bank, collect
from ..bank.corpus import Chunk, Encode, pack, pack_all
from ..data import Entry
from ..embed import Embedder
from ..engine import Engine
from ..generation import Generation
from ..model.load import load_model
from ..train.holdout import split_of, title_key
from .questions import Question, draw, is_hit

MODES = ("none", "memory", "rag")
TITLES = {"none": "no memory", "memory": "explicit memory", "rag": "RAG (text in the prompt)"}
ANSWER_TOKENS = 32
BATCH = 8
TIMED_TOKENS = 64


@dataclass
class Row:
    """One line of the report. Rates in 0..1, loss in nats per token, seconds, bytes."""

    mode: str
    hits: float
    loss: float
    loss_fact: float
    loss_sentence: float
    found: float | None
    ttft_s: float
    tokens_per_s: float
    kv_bytes: int
    bytes_per_chunk: int


def choose_entries(encode: Encode, span: int, count: int, seed: int) -> list[Entry]:
    """Entries for `count` references (a few more: entries stay whole), half wiki and half factbook, drawn by seed.

    Titles that no adapter was trained on (memory3.train.holdout) come first: a bank of up to 5,000 holds only those.
    """
    chosen: list[Entry] = []
    for source, entries in (("wiki", data.wiki()), ("factbook", data.factbook())):
        pool = list(entries)
        random.Random(f"{seed}-{source}").shuffle(pool)
        pool.sort(key=lambda entry: split_of(title_key(entry)) == "train")
        pieces = 0
        for entry in pool:
            if pieces >= (count + 1) // 2:
                break
            pieces += len(pack(entry, encode, span))
            chosen.append(entry)
    return chosen


def held_out(chunk: Chunk) -> bool:
    """Whether a reference is of a title that is never trained on."""
    return split_of(title_key(Entry(chunk.title, chunk.text, chunk.source))) != "train"


def batches(items: Sequence, size: int):
    for i in range(0, len(items), size):
        yield items[i : i + size]


def ask(engine: Engine, questions: Sequence[Question], tick: Callable[[], None]) -> list[Generation]:
    """Answers to all questions in one mode, each with the loss of the right answer."""
    answers: list[Generation] = []
    for part in batches(questions, BATCH):
        answers += engine.generate(
            [q.prompt for q in part],
            max_new_tokens=ANSWER_TOKENS,
            stop="\n",
            collect_mass=engine.reads_memory,
            score=[" " + q.answer for q in part],
        )
        for _ in part:
            tick()
    return answers


def time_modes(engines: dict[str, Engine], questions: Sequence[Question], rounds: int) -> dict[str, tuple]:
    """Medians over rounds of (time to first token, tokens/s), batch 1, modes interleaved."""
    seen: dict[str, list[tuple[float, float]]] = {mode: [] for mode in engines}
    for i in range(rounds):
        for mode, engine in engines.items():
            stats = engine.generate(
                questions[i % len(questions)].prompt, max_new_tokens=TIMED_TOKENS, ignore_eos=True
            ).stats
            seen[mode].append((stats.ttft_s, stats.tokens_per_s))
    return {m: (statistics.median(t for t, _ in v), statistics.median(s for _, s in v)) for m, v in seen.items()}


def run(folder: Path, references: int, count: int, seed: int, threads: int, ui, adapter: str | None = None) -> dict:
    """The whole demo; `ui` shows progress and tables (memory3.demo.screen). Returns the report as a dict.

    adapter: as load_model takes it. Questions are about titles that it was not trained on.
    """
    if threads:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    with ui.status("loading SmolLM2-135M and the embedder"):
        model, embedder = load_model("smollm2-135m", adapter=adapter), Embedder()
    with ui.status("choosing references and questions"):
        encode, span = model.tokenizer.encode_reference, model.memory.span
        entries = choose_entries(encode, span, references, seed)
        chunks = collect(pack_all(entries, encode, span))
        questions = draw([(c.title, c.text, c.source) if held_out(c) else ("-", "", "") for c in chunks], count, seed)
    path = folder / f"bank-{references}-{seed}"
    built = build_bank(path, entries, model, embedder)
    bank = Bank.open(path, model.identity(embedder=embedder.name))
    ui.bank_ready(len(bank), built)
    gold = [bank.record_id(chunks[q.gold].token_ids) for q in questions]
    engines = {mode: Engine(model, bank, embedder, mode=mode) for mode in MODES}
    results = {}
    with ui.asking(len(questions) * len(MODES)) as tick:
        for mode, engine in engines.items():
            results[mode] = ask(engine, questions, tick)
    with ui.status(f"timing {TIMED_TOKENS} tokens, batch 1, modes interleaved"):
        speed = time_modes(engines, questions, 5)
    rows = [summary(mode, questions, gold, results[mode], *speed[mode]) for mode in MODES]
    report = {
        "adapter": adapter,
        "references": len(bank),
        "questions": len(questions),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begin,
        "rows": [asdict(row) for row in rows],
        "answers": [
            {
                "question": q.text,
                "stem": q.stem,
                "answer": q.answer,
                "gold": gold[i].hex(),
                **{mode: results[mode][i].text for mode in MODES},
                "loss": {mode: results[mode][i].loss for mode in MODES},
                "hit": {mode: is_hit(q, results[mode][i].text) for mode in MODES},
                "read": [
                    {"id": record.hex(), "mass": read.mass[j] if read.mass else None, "similarity": read.scores[j],
                     "text": bank.text(record)}
                    for read in results["memory"][i].reads[:1]
                    for j, record in enumerate(read.ids)
                ],
            }
            for i, q in enumerate(questions)
        ],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    ui.show(report)
    return report


def summary(mode, questions, gold, answers: list[Generation], ttft_s: float, tokens_per_s: float) -> Row:
    """Means over the questions; `found` only where memories were read."""

    def loss(*kinds: str) -> float:
        return statistics.mean(a.loss for a, q in zip(answers, questions, strict=True) if q.kind in kinds)

    found = None
    if mode == "memory":
        found = statistics.mean(
            any(g in read.ids for read in a.reads if read.where == "prompt") for a, g in zip(answers, gold, strict=True)
        )
    stats = [a.stats for a in answers]
    return Row(
        mode=mode,
        hits=statistics.mean(is_hit(q, a.text) for q, a in zip(questions, answers, strict=True)),
        loss=loss("fact", "sentence"),
        loss_fact=loss("fact"),
        loss_sentence=loss("sentence"),
        found=found,
        ttft_s=ttft_s,
        tokens_per_s=tokens_per_s,
        kv_bytes=round(statistics.mean(s.kv_bytes for s in stats)),
        bytes_per_chunk=round(statistics.mean(s.bytes_loaded / max(1, s.retrievals) for s in stats)),
    )
