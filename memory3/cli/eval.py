"""memory3 eval"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import DEFAULT_MODEL, ModelOption, ThreadsOption, err, out, set_threads

CPU_MINUTES = 55.0  # the whole evaluation takes a CPU hours; its part in an hour is about all arms and sets
EXAMPLES = """
[bold]Examples[/bold]\n
memory3 eval --quick --json quick.json\n
memory3 eval --json full.json --out runs/eval --closed-book runs/none/adapter --text-reader runs/text/adapter\n
memory3 eval --adapter none --json original.json --questions 200 --others 50\n
memory3 eval --ablate --questions 100 --others 0 --json ablations.json\n
memory3 eval --prepare questions.npz   [dim]then, where only the checkpoint is:[/dim]\n
memory3 eval --prepared questions.npz --device cuda --json full.json\n
Stopped or killed? Run the same command again: answers that are there are kept.
"""


def run(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go; a .png is drawn beside it.")] = Path(
        "eval.json"
    ),
    folder: Annotated[Path, typer.Option("--out", help="Answers and vectors, kept for the next call.")] = Path(".eval"),
    quick: Annotated[bool, typer.Option("--quick", help="40 questions of SQuAD and SciQ, 16 of the others.")] = False,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions of SQuAD and of SciQ (there are 1,000 and 887).")
    ] = 1000,
    others: Annotated[int, typer.Option(min=0, help="Questions of each other set.")] = 250,
    controls: Annotated[
        int, typer.Option(min=0, help="Questions per set of RAG, VQ, full KV and the controls; 0: all of them.")
    ] = 250,
    spoken: Annotated[int, typer.Option(min=0, help="Questions per set that are also answered in words.")] = 100,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Only these sets (repeatable).")] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="Only the arm of this name, or arms whose names hold this text.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="shipped, the folder of an adapter, or none.")] = "shipped",
    closed_book: Annotated[
        Path | None, typer.Option(help="Adapter trained equally long with nothing to read (read=none).")
    ] = None,
    text_reader: Annotated[
        Path | None, typer.Option(help="Adapter trained equally long to read text (read=text).")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: a further adapter, with its own memory settings (repeatable)."),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Tables that need no training instead: tokens, layers, rules, codecs.")
    ] = False,
    text: Annotated[
        list[Path] | None, typer.Option(help="General text to compare readers on, without memory: files or folders.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of 256 tokens of each --text.")] = 100,
    prepare: Annotated[
        Path | None, typer.Option(help="Only write questions, references and what is found for them into this file.")
    ] = None,
    prepared: Annotated[
        Path | None, typer.Option(help="Ask what --prepare wrote: needs no texts and no embedder.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help=f"Ask no more after so long, and report (default: {CPU_MINUTES:g} on a CPU; 0: all of it)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
    model: ModelOption = DEFAULT_MODEL,
    threads: ThreadsOption = 0,
) -> None:
    """Ask questions with no memory, with memories, and with text, and compare."""
    from ..eval.arms import ablations, main_arms
    from ..eval.general import cut_windows, general_losses
    from ..eval.load import about, books, load_readers
    from ..eval.prepared import Plan, Prepared
    from ..eval.report import difference, table
    from ..eval.run import Evaluation
    from ..eval.sets import BENCHMARKS, KNOWN, SETS

    set_threads(threads)
    began = time.monotonic()
    if minutes is None:
        minutes = CPU_MINUTES if device == "cpu" else 0
    if quick:
        questions, others, controls, spoken = 40, 16, 0, 16
    given = Prepared.load(prepared) if prepared is not None else None
    chosen = sets or (list(given.asked) if given else [s for s in SETS if s not in KNOWN])
    counts = {s: (questions if s in BENCHMARKS else others) for s in chosen}
    plan = Plan({s: n for s, n in counts.items() if n}, seed)
    if prepare is not None:
        return _prepare(plan, model, text or (), windows, folder, prepare)
    rivals = {"closed_book": closed_book, "text_reader": text_reader, "also": _named_folders(also or ())}
    readers, tokenizer = load_readers(model, adapter, device=device, **rivals)
    net = readers["original"].net
    if given is None:
        given = _lookup(plan, tokenizer, net.memory.span, folder)
    rivals["reader_of_text"] = rivals.pop("text_reader")
    evaluation = Evaluation(
        given.fewer(plan.counts), readers, tokenizer, folder, generate=0 if ablate else spoken,
        codecs=books(model, adapter), about=about(model, readers, adapted=adapter, **rivals),
        until=began + 60 * minutes if minutes else None,
    )  # fmt: skip
    if ablate:
        who = "adapted" if "adapted" in readers else "original"
        groups = ablations(net.config.n_layers, net.config.n_kv_heads, who)
        groups = {name: part for name, part in groups.items() if not arms or any(a in name for a in arms)}
        groups = {"without, and as it is": main_arms({who: readers[who]})[:2], **groups}
    else:
        groups = {"": _chosen(main_arms(readers, controls), arms)}
    report: dict[str, Any] = {"settings": json.loads((folder / "settings.json").read_text()), "tables": {}}
    for name, part in groups.items():
        part = [_named(name, a) for a in part]
        with _bar(name or "asking", evaluation.todo(part)) as tick:
            results = evaluation.run(part, tick)
        left = evaluation.todo(part)
        if left:
            err.print(f"[dim]{left} answers are missing after {minutes:g} minutes; the same command goes on[/dim]")
        report["tables"][name] = _summary(results)
        _show(name, report["tables"][name]["rows"])
    texts = {**given.texts, **cut_windows(text or (), tokenizer, windows, seed)}
    if texts:
        with _bar("general text", len(readers) * sum(map(len, texts.values()))) as tick:
            results = general_losses(readers, tokenizer, texts, tick)
        rises = {
            name: difference(results, f"{name}: no memory", "original: no memory")
            for name in readers
            if name != "original"
        }
        report["general text"] = {"rows": table(results), "against the original": rises}
        _show("general text, nats per token", report["general text"]["rows"])
    report["seconds"] = round(time.monotonic() - began, 1)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _draw(report, json_file.with_suffix(".png"))


def _lookup(plan, tokenizer, span: int, folder: Path):
    """The questions, with what the retriever finds for them."""
    from ..data import DataMissing
    from ..embed import Embedder
    from ..eval.prepared import prepare

    try:
        return prepare(
            plan, tokenizer, span, Embedder(), folder / "vectors", lambda what: err.print(f"[dim]{what}[/dim]")
        )
    except DataMissing as error:  # which names the command that installs it
        raise FileNotFoundError(f"{error}; or leave the sets out that need it (--set)") from None


def _prepare(plan, model: str, texts, windows: int, folder: Path, file: Path) -> None:
    """Everything that needs no weights, into one file."""
    from dataclasses import replace

    from ..eval.general import cut_windows
    from ..model.load import default_memory, open_checkpoint

    checkpoint, memory = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    span = (memory or default_memory(checkpoint.config, tokenizer)).span
    prepared = _lookup(plan, tokenizer, span, folder)
    prepared = replace(prepared, texts=cut_windows(texts, tokenizer, windows, plan.seed))
    prepared.save(file)
    told = ", ".join(f"{len(part):,} of {name}" for name, part in prepared.asked.items())
    among = ", ".join(f"{len(part):,} {which}" for which, part in prepared.among.items())
    out.print(f"{file}: questions: {told}; references: {among}; {file.stat().st_size / 1e6:.1f} MB")


def _named_folders(given) -> dict[str, Path]:
    """NAME=FOLDER by name. Raises ValueError for anything else, and for a name that a reader has already."""
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in ("original", "adapted", "closed book", "reader of text", *found):
            raise ValueError(f"--also {text!r}: expected NAME=FOLDER with a name of its own")
        found[name] = Path(folder)
    return found


def _chosen(arms, wanted):
    """Of each text the arm of that name, else the arms whose names hold it; all arms without any text."""
    names = {a.name for a in arms}
    return [a for a in arms if not wanted or any(a.name == w or (w not in names and w in a.name) for w in wanted)]


def _named(group: str, arm):
    """Arms of an ablation carry its name, so that answers on disk do not collide."""
    from dataclasses import replace

    return replace(arm, name=f"{group}: {arm.name}") if group else arm


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    from ..eval import report
    from ..eval.arms import CODECS

    arms = {r["arm"] for r in results}
    found: dict[str, Any] = {"rows": report.table(results)}

    def first(*names: str) -> str | None:
        return next((n for n in names if n in arms), None)

    memory = first("adapted: memory", "original: memory")
    closed = first("trained closed book", "adapted: no memory", "original: no memory")
    text = first("trained reader: RAG 5", "adapted: RAG 5", "original: RAG 5")
    if memory and closed and text:
        against = {"memory": memory, "closed": closed, "text": text}
        found["gap closed"] = {**against, "rows": report.gap_closed(results, memory, closed, text)}
    for who in ("adapted", "original"):
        pairs = {
            **{f"{n} against bf16": (f"{who}: memory, {n}", f"{who}: memory") for n in CODECS},
            "random memories against none": (f"{who}: random memories", f"{who}: no memory"),
        }
        for name, (one, other) in pairs.items():
            if {one, other} <= arms:
                found[f"{who}, {name}"] = {"rows": report.difference(results, one, other)}
    return found


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    sets = list(dict.fromkeys(r["set"] for r in rows))
    table = Table("", *sets, title=title or "nats per answer token ± half of the 95 % interval; F1", title_style="bold")
    for arm in dict.fromkeys(r["arm"] for r in rows):
        by = {r["set"]: r for r in rows if r["arm"] == arm}
        cells = []
        for s in sets:
            if s not in by:
                cells.append("")
                continue
            low, high = by[s]["nll_interval"]
            told = "" if by[s]["f1"] is None else f"  F1 {by[s]['f1']:.2f}"
            cells.append(f"{by[s]['nll']:.2f} ±{(high - low) / 2:.2f}{told} [dim]n={by[s]['n']}[/dim]")
        table.add_row(arm.removeprefix(f"{title}: "), *cells)
    out.print(table)


def _draw(report: dict[str, Any], file: Path) -> None:
    from ..eval.report import draw

    rows = [row for part in report["tables"].values() for row in part["rows"]]
    if not rows:
        return
    try:
        draw(rows, file, "SmolLM2-135M: loss of the right answer")
    except ImportError as error:
        err.print(f"[dim]no picture: {error}[/dim]")


@contextmanager
def _bar(what: str, total: int):
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
