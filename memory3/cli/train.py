"""memory3 train"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, ThreadsOption, err, out, print_json, set_threads
from .write import entries

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 train --config tiny --out runs/tiny\n
memory3 train --config tiny --stage continual --from runs/tiny --out runs/tiny-memory\n
memory3 train --config smollm2-135m --stage sft --out runs/smol --set steps=500\n
torchrun --nproc-per-node 2 -m memory3 train --config tiny --out runs/two\n
memory3 train --config smollm2-135m --stage sft --reference wiki --prepare smol.npz   (then, elsewhere: --prepared)\n
memory3 train --config paper-2.4b --show   (what it computes and what a GPU needs for it)\n
Stopped or killed? Run the same command again: it goes on from the last checkpoint.
"""


def run(
    config: Annotated[str, typer.Option(help="paper-2.4b, tiny or smollm2-135m.")] = "tiny",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run.")] = None,
    stage: Annotated[
        str, typer.Option(help="warmup (text), continual (text with memories) or sft (questions with memories).")
    ] = "warmup",
    start: Annotated[
        Path | None, typer.Option("--from", help="Begin with the weights of another run, or any checkpoint.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="What to train on: files, folders, wiki, factbook (default: wiki).")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="What memories are made of, without --bank (default: as --text).")
    ] = None,
    bank: Annotated[Path | None, typer.Option(help="Bank of references; if frozen, by this model.")] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluation texts (.jsonl, .txt, .gz): what shares 13 words in a row is not trained on."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Draw at most this many entries of each --reference (by seed).")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field: lr=1e-4, write=live, memory.tokens=16, lora.rank=8"),
    ] = None,
    prepare: Annotated[
        Path | None,
        typer.Option(help="Write the data of an sft run into this file and train nothing: for a machine without them."),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="With --prepare: at most so many questions to train on, drawn by seed.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="With --prepare: how often each reference is asked about, in other words.")
    ] = 1,
    prepared: Annotated[
        Path | None, typer.Option(help="Train on such a file; no texts, embedder or bank are needed.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU where there is one).")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard events.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print memory and work per step; train nothing.")] = False,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a model to write and read memories: warmup, continual training, tuning on questions."""
    from ..train.accounting import account
    from ..train.prepare import prepare_file
    from ..train.presets import run_config
    from ..train.run import train

    settings = with_changes(run_config(config, stage), change or [], start)
    if show:
        return out.print_json(settings.to_json()) if as_json else out.print(account(settings).text(), markup=False)
    if folder is None and prepare is None:
        raise ValueError("out: expected a folder for the run, got none; --out DIR")
    set_threads(threads)
    sources = text or ["wiki"]
    data: dict[str, Any] = {
        "texts": entries(text or []) if stage == "sft" else entries(sources),
        "references": ()
        if bank or prepared or stage == "warmup"
        else drawn(reference or sources, limit, settings.seed),
        "bank": bank,
        "exclude": evaluation_texts(exclude or []),
        "notify": lambda what: err.print(f"[dim]{what}[/dim]"),
    }
    if prepare is not None:
        made = prepare_file(settings, prepare, questions=questions, rounds=rounds, **data)
        counts = {split: len(items) for split, items in made.items.items()}
        summary = {"file": str(prepare), "references": len(made.references), "questions": counts,
                   "plain": len(made.plain)}  # fmt: skip
        return print_json(summary) if as_json else out.print(summary, markup=False)
    found = train(settings, folder, **data, prepared=prepared, device=device, tensorboard=tensorboard)
    if found is not None:
        print_json(found) if as_json else out.print(f"{found['result']}: {found['evaluation']}", markup=False)


def with_changes(config, changes: list[str], start: Path | None):
    """The configuration with `name=value` put in (names of nested fields with a dot) and another beginning.

    Raises ValueError naming what is not a field.
    """
    from ..train.config import TrainConfig

    raw = json.loads(config.to_json())
    for item in changes:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"set: expected name=value, got {item!r}")
        *parents, last = name.split(".")
        at: dict[str, Any] = raw
        for parent in parents:
            at[parent] = at.get(parent) or {}
            at = at[parent]
        try:
            at[last] = json.loads(value)
        except ValueError:
            at[last] = None if value == "none" and name != "read" else value
    if start is not None:
        model = start / "model"
        raw.update(model=str(model if model.is_dir() else start), shape=None)
    return TrainConfig.from_json(json.dumps(raw))


def drawn(sources: list[str], limit: int | None, seed: int) -> Iterator:
    """The entries of each source, or `limit` of them drawn by seed."""
    for source in sources:
        found = list(entries([source]))
        if limit is not None and limit < len(found):
            random.Random(f"{seed} {source}").shuffle(found)
        yield from found[:limit]


def evaluation_texts(paths: list[Path]) -> Iterator[str]:
    """Every text in files of JSON lines (all strings in them, however deep) or plain text; folders are searched."""
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            opened = gzip.open if file.suffix == ".gz" else open
            with opened(file, "rt", encoding="utf-8") as lines:
                if ".jsonl" in file.suffixes or ".json" in file.suffixes:
                    for line in lines:
                        yield from _strings(json.loads(line))
                else:
                    yield lines.read()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
