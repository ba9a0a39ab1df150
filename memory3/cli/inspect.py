"""memory3 inspect"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .common import BankArgument, JsonOption, human_bytes, out, print_json
from .show import clip

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 inspect my.bank\n
memory3 inspect my.bank 3f2a --layer 12\n
memory3 inspect my.bank --verify
"""


def run(
    bank: BankArgument,
    record: Annotated[str | None, typer.Argument(help="First characters of a record id (search prints them).")] = None,
    layer: Annotated[int, typer.Option(help="Memory layer whose kept tokens are shown.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Read every record and check it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bank holds, or which tokens of a reference were kept. Exit code 1 if --verify finds damage."""
    from ..bank import Bank

    with Bank.open(bank) as store:
        if record is not None:
            return show_record(store, find(store, record), layer, as_json)
        stats = store.stats()
        broken = store.verify() if verify else []
        if verify:
            stats["broken"] = [{"id": i.hex(), "reason": reason} for i, reason in broken]
        if as_json:
            print_json(stats)
        else:
            show_stats(stats)
            for i, reason in broken:
                out.print(f"[red]broken[/red] {i.hex()}: {reason}")
            if verify and not broken:
                out.print("every record is whole")
    if broken:
        raise typer.Exit(1)


def find(store, start: str) -> bytes:
    """The one id that begins with these hex characters."""
    found = [i for i in store.ids() if i.hex().startswith(start.lower())]
    if len(found) != 1:
        raise ValueError(f"record: expected the start of one id, {start!r} fits {len(found)}; `memory3 search` has ids")
    return found[0]


def show_record(store, record: bytes, layer: int, as_json: bool) -> None:
    info = store.inspect(record)
    reference = info.reference
    layers = list(store.identity.layers)
    if layer not in range(len(layers)):
        raise ValueError(f"layer: expected 0 to {len(layers) - 1} (memory layers), got {layer}")
    heads = [] if info.cold else [info.kept(layer, h) for h in range(store.identity.record_heads)]
    if as_json:
        return print_json(
            {
                "id": record.hex(),
                "text": reference.text,
                "tokens": len(reference.token_ids),
                "cold": info.cold,
                "kept_per_head": info.n_valid,
                "bytes": info.bytes,
                "layer": layers[layer],
                "positions": heads,
            }
        )
    out.print(f"[bold]{record.hex()}[/bold]  {len(reference.token_ids)} tokens", "cold" if info.cold else "")
    out.print(reference.text, markup=False, soft_wrap=True)
    if not info.cold:
        out.print(f"{info.n_valid} tokens per head kept, {human_bytes(info.bytes)}; layer {layers[layer]}:")
        for h, positions in enumerate(heads):
            out.print(f"  head {h}: {' '.join(map(str, positions))}", markup=False, soft_wrap=True)


def show_stats(stats: dict) -> None:
    table = Table("what", "value", show_header=False)
    for name, value in stats.items():
        if isinstance(value, dict):
            for inner, v in value.items():
                table.add_row(f"{name}.{inner}", clip(str(v), 90))
        elif "bytes" in name and isinstance(value, (int, float)):
            table.add_row(name, human_bytes(value))
        else:
            table.add_row(name, clip(str(value), 90))
    out.print(table)
