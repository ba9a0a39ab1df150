"""memory3 search"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .common import BankArgument, JsonOption, out, print_json
from .show import clip

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 search my.bank "capital of Fiji"\n
memory3 search my.bank "how do tides work" -k 10 --json
"""


def run(
    bank: BankArgument,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="References to show.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Find the references most similar to a query (no language model is loaded)."""
    from ..bank import Bank
    from ..embed import Embedder

    store = Bank.open(bank)
    embedder = Embedder()
    if store.identity.embedder not in ("", embedder.name):
        raise ValueError(f"the bank was embedded with {store.identity.embedder!r}, this command has {embedder.name!r}")
    ids, scores = store.search(embedder.encode([query]), count)
    found = [{"id": i.hex(), "score": float(s), "text": store.text(i)} for i, s in zip(ids[0], scores[0], strict=True)]
    if as_json:
        return print_json({"query": query, "references": found})
    table = Table("similarity", "record", "reference")
    for hit in found:
        table.add_row(f"{hit['score']:.3f}", hit["id"][:12], clip(hit["text"], 100))
    out.print(table)
