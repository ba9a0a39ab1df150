"""Writes the demo's bank, asks its questions three ways and reports."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..engine import Engine
from .questions import Question, draw, is_hit

MODES = ("none", "memory", "rag")
TITLES = {"none": "no memory", "memory": "explicit memory", "rag": "RAG (text in the prompt)"}
ANSWER_TOKENS = 32
TIMED_TOKENS = 64


@dataclass
class Reference:
    """One piece of a corpus entry, at most 128 tokens."""

    title: str
    text: str
    source: str
    token_ids: list[int]


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


def choose_references(tokenizer, span: int, count: int, seed: int) -> list[Reference]:
    """`count` references, half wiki and half factbook entries, drawn by seed; whole entries, so slightly more."""
    from .. import data
    from ..bank.corpus import pack

    chosen: list[Reference] = []
    for source, entries in (("wiki", data.wiki()), ("factbook", data.factbook())):
        pool = list(entries)
        random.Random(f"{seed}-{source}").shuffle(pool)
        mine: list[Reference] = []
        for entry in pool:
            if len(mine) >= count // 2:
                break
            for piece in pack(entry, tokenizer, span):
                mine.append(Reference(entry.title, piece.text, source, piece.token_ids))
        chosen += mine
    return chosen


def batches(items: Sequence, size: int):
    for i in range(0, len(items), size):
        yield items[i : i + size]


def ask(engine: Engine, questions: Sequence[Question], gold: Sequence[bytes], batch: int, tick: Callable[[], None]):
    """Answers and losses of all questions in one mode; `found` is the share whose gold reference was retrieved."""
    answers, losses = [], []
    for part in batches(questions, batch):
        prompts = [q.prompt for q in part]
        answers += engine.generate(
            prompts, max_new_tokens=ANSWER_TOKENS, stop=("\n",), collect_mass=engine.reads_memory
        )
        losses += engine.score(prompts, [" " + q.answer for q in part])
        for _ in part:
            tick()
    return answers, losses


def time_modes(engines: dict[str, Engine], questions: Sequence[Question], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians over rounds of (time to first token, tokens/s), batch 1, modes interleaved."""
    seen: dict[str, list[tuple[float, float]]] = {mode: [] for mode in engines}
    for i in range(rounds):
        for mode, engine in engines.items():
            stats = engine.generate(
                questions[i % len(questions)].prompt, max_new_tokens=TIMED_TOKENS, ignore_eos=True
            ).stats
            seen[mode].append((stats.ttft_s, stats.tokens_per_s))
    return {m: (statistics.median(t for t, _ in v), statistics.median(s for _, s in v)) for m, v in seen.items()}


def run(folder: Path, references: int, count: int, seed: int, threads: int, ui) -> dict:
    """The whole demo; `ui` shows progress and tables (memory3.demo.screen). Returns the report as a dict."""
    import torch

    from .. import load_model
    from ..bank import Bank
    from ..bank.build import build_bank
    from ..embed import Embedder

    if threads:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    with ui.status("loading SmolLM2-135M and the embedder"):
        model, embedder = load_model("smollm2-135m"), Embedder()
    with ui.status("choosing references"):
        chosen = choose_references(model.tokenizer, model.memory.span, references, seed)
        questions = draw([(r.title, r.text, r.source) for r in chosen], count, seed)
    identity = model.identity(embedder=embedder.name)
    path = folder / f"bank-{references}-{seed}"
    fresh = not (path / "data.mdb").exists()
    with Bank.create(path, identity) if fresh else Bank.open(path, identity, write=True) as bank:
        written = build_bank(
            bank, model, embedder, [(r.title, r.text, r.source, r.token_ids) for r in chosen], progress=ui.progress
        )
    write_s = time.perf_counter() - begin
    bank = Bank.open(path, identity)
    ui.bank_ready(len(bank), written, bank.stats(), write_s)
    gold = [bank.record_id(chosen[q.gold].token_ids) for q in questions]
    engines = {mode: Engine(model, bank, embedder, mode=mode) for mode in MODES}
    results = {}
    with ui.asking(len(questions) * len(MODES)) as tick:
        for mode, engine in engines.items():
            results[mode] = ask(engine, questions, gold, 8, tick)
    with ui.status(f"timing {TIMED_TOKENS} tokens, batch 1, modes interleaved"):
        speed = time_modes(engines, questions, 5)
    rows = [summary(mode, engines[mode], questions, gold, *results[mode], *speed[mode]) for mode in MODES]
    report = {
        "references": len(bank),
        "questions": len(questions),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begin,
        "rows": [asdict(row) for row in rows],
        "answers": [
            {
                "question": q.text,
                "answer": q.answer,
                "gold": gold[i].hex(),
                **{mode: results[mode][0][i].text for mode in MODES},
                "loss": {mode: results[mode][1][i] for mode in MODES},
                "read": [
                    {"id": record.hex(), "mass": read.mass[j] if read.mass else None, "similarity": read.scores[j],
                     "text": bank.text(record)}
                    for read in results["memory"][0][i].reads[:1]
                    for j, record in enumerate(read.ids)
                ],
            }
            for i, q in enumerate(questions)
        ],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    ui.show(report)
    return report


def summary(mode, engine, questions, gold, answers, losses, ttft_s, tokens_per_s) -> Row:
    """Means over the questions; `found` only where memories were read."""
    by_kind = {k: [x for x, q in zip(losses, questions, strict=True) if q.kind == k] for k in ("fact", "sentence")}
    found = None
    if mode == "memory":
        found = statistics.mean(
            any(g in read.ids for read in a.reads if read.where == "prompt") for a, g in zip(answers, gold, strict=True)
        )
    stats = [a.stats for a in answers]
    record = engine.arena.kv[0].nbytes if engine.reads_memory else 0
    return Row(
        mode=mode,
        hits=statistics.mean(is_hit(q, a.text) for q, a in zip(questions, answers, strict=True)),
        loss=statistics.mean(losses),
        loss_fact=statistics.mean(by_kind["fact"]),
        loss_sentence=statistics.mean(by_kind["sentence"]),
        found=found,
        ttft_s=ttft_s,
        tokens_per_s=tokens_per_s,
        kv_bytes=round(statistics.mean(s.kv_bytes for s in stats)),
        bytes_per_chunk=record * engine.refs,
    )
