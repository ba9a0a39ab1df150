"""memory3 chat"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_MODEL, ModelOption, ThreadsOption, WeightsOption, err, load, out, set_threads
from .show import show_reads, show_stats

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 chat\n
memory3 chat --bank my.bank --reads\n
memory3 chat --bank my.bank --overflow slide --system "Answer in one sentence."\n
Inside: /reads and /stats show the last turn, /reset starts over, /quit ends (or Ctrl-D).
"""


def run(
    bank: Annotated[Path | None, typer.Option("--bank", "-b", help="Folder of a bank to read memories from.")] = None,
    system: Annotated[str | None, typer.Option(help="System message (default: the template's own).")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens per answer at most.")] = 256,
    overflow: Annotated[str, typer.Option(help="A full context: error, or slide (oldest turns fall out).")] = "error",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    reads: Annotated[bool, typer.Option("--reads", help="After each answer, show the references read.")] = False,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "auto",
    threads: ThreadsOption = 0,
) -> None:
    """Talk to the model; with a bank, every turn retrieves its own memories."""
    from ..bank import Bank
    from ..chat import Chat
    from ..engine import Engine
    from ..sampling import Sampling

    set_threads(threads)
    store = Bank.open(bank) if bank is not None else None
    engine = Engine(load(model, identity=store.identity if store else None, weights=weights), store)
    chat, last = Chat(engine, system, overflow=overflow), None
    sampling = Sampling(temperature, top_p=top_p, seed=seed)
    while True:
        try:
            line = input("> " if err.is_terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.close()
            chat = Chat(engine, system, overflow=overflow)
        elif line in ("/reads", "/stats"):
            if last is None:
                err.print("no turn yet")
            elif line == "/stats":
                show_stats(last.stats)
            elif store is not None:
                show_reads(last.reads, store)
        elif line:
            last = chat.send(
                line,
                max_new_tokens=tokens,
                sampling=sampling,
                collect_mass=reads,
                on_text=lambda _, piece: out.print(piece, end="", markup=False, soft_wrap=True),
            )
            out.print()
            if reads and store is not None:
                show_reads(last.reads, store)
