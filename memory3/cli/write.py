"""memory3 write"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..config import layer_list
from .common import (
    DEFAULT_MODEL,
    BankArgument,
    JsonOption,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    load,
    out,
    print_json,
    set_threads,
)

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 write my.bank notes.md books/ facts.jsonl\n
memory3 write wiki.bank wiki --limit 2000\n
memory3 write small.bank wiki factbook --codec OPQ8_64,Residual2x8,PQ8x8\n
memory3 write later.bank wiki --cold   (memories are written when first retrieved)\n
Killed in the middle? Run the same command again: what is there is kept.
"""
CORPORA = ("wiki", "factbook")


def entries(sources: list[str]) -> Iterator:
    """Entries of files, folders and the corpora by name, in order."""
    from .. import data
    from ..bank.corpus import read_corpus

    for source in sources:
        if source in CORPORA and not Path(source).exists():
            yield from getattr(data, source)()
        else:
            yield from read_corpus(source)


def run(
    bank: BankArgument,
    sources: Annotated[
        list[str], typer.Argument(help="Files (.jsonl, .txt, .md), folders of them, or the corpora wiki and factbook.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many references.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="Vector-quantise records: OPQ{M}_{d},Residual2x{b},PQ{m}x{n}, as FAISS names it.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Memory layers of a new bank, such as 10-24 (calibrate).")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens kept per head in a new bank.")] = None,
    rule: Annotated[str | None, typer.Option(help="Selection rule of a new bank: received, exp or causal.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Register text only; memories at first retrieval.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="References encoded and committed at once.")] = 16,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "auto",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write texts into a bank as explicit memories; makes the bank if it is not there, goes on if it is."""
    from ..bank import Bank
    from ..bank.build import build_bank

    set_threads(threads)
    for source in sources:
        if source not in CORPORA and not Path(source).exists():
            raise FileNotFoundError(f"no such file or folder: {source} (corpora by name: {', '.join(CORPORA)})")
    identity = Bank.open(bank).identity if (bank / "data.mdb").is_file() else None
    report = build_bank(
        bank,
        entries(sources),
        load(model, as_json, identity, weights, layers=layer_list(layers), tokens=tokens, rule=rule),
        codec=codec,
        limit=limit,
        cold=cold,
        batch=batch,
        progress=not as_json,
    )
    if as_json:
        print_json({**vars(report), "per_second": report.per_second})
    else:
        out.print(
            f"{report.references} references in {bank}: {report.written} written now "
            f"({report.per_second:.1f}/s), {report.present} were there"
        )
