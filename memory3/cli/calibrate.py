"""memory3 calibrate"""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .common import (
    DEFAULT_MODEL,
    JsonOption,
    ModelOption,
    ThreadsOption,
    err,
    human_bytes,
    load,
    out,
    print_json,
    set_threads,
)
from .write import entries

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 calibrate wiki\n
memory3 calibrate notes/ --tokens 8 --tokens 16 --budget 400000\n
memory3 calibrate wiki --rule causal --rule received --json\n
The line it ends with goes into `memory3 write`: the bank remembers the choice.
"""


def run(
    sources: Annotated[list[str], typer.Argument(help="Files (.jsonl, .txt, .md), folders, or wiki and factbook.")],
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens kept per head to try (default 8, 16, 32).")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Selection rules to try (default: the model's).")] = None,
    budget: Annotated[int | None, typer.Option(help="Most bytes of one memory.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Passages to measure on.")] = 30,
    seed: Annotated[int, typer.Option(help="Draws the passages.")] = 0,
    model: ModelOption = DEFAULT_MODEL,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose memory layers and tokens per head for a checkpoint: measure the answer loss of every candidate."""
    from ..calibrate import calibrate

    set_threads(threads)
    net = load(model, quiet=as_json)
    texts = [entry.text for entry in itertools.islice(entries(sources), 20 * samples)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        result = calibrate(
            net,
            texts,
            tokens=tuple(tokens or (8, 16, 32)),
            rules=tuple(rule) if rule else None,
            byte_budget=budget,
            limit=samples,
            seed=seed,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )
    if as_json:
        return print_json(result.to_dict())
    table = Table("layers", "tokens per head", "rule", "bytes per memory", "answer loss")
    for c in sorted(result.table, key=lambda c: c.nll):
        mark = "bold" if c == result.best else ""
        where = f"{c.band} ({c.layers[0]}-{c.layers[-1]})"
        table.add_row(where, str(c.tokens), c.rule, human_bytes(c.bytes), f"{c.nll:.3f}", style=mark)
    out.print(table)
    out.print(
        f"without memory {result.nll_without:.3f}, with the text in the context {result.nll_text:.3f} "
        f"(nats per token, {result.samples} passages, {result.answer_tokens} tokens)"
    )
    best = result.best
    layers = f"{best.layers[0]}-{best.layers[-1]}"
    out.print(f"memory3 write BANK SOURCES --layers {layers} --tokens {best.tokens} --rule {best.rule}")
