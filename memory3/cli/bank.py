"""memory3 bank: keeping a bank in order"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import BankArgument, err, human_bytes, out

app = typer.Typer(no_args_is_help=True, help="Keep a bank in order: delete, compact, export, import, salvage.")
FileArgument = Annotated[Path, typer.Argument(help="The exported file.")]


@app.command(epilog="[bold]Example[/bold]: memory3 bank delete my.bank 3f2a9c 77b0 --yes")
def delete(
    bank: BankArgument,
    records: Annotated[list[str], typer.Argument(help="First characters of record ids.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete references and their memories."""
    from ..bank import Bank
    from .inspect import find

    with Bank.open(bank, write=True) as store:
        ids = [find(store, r) for r in records]
        if not yes:
            for i in ids:
                out.print(i.hex()[:12], store.text(i)[:90], markup=False)
            typer.confirm(f"Delete {len(ids)} references?", abort=True)
        out.print(f"deleted {store.delete(ids)} references")


@app.command(epilog="[bold]Example[/bold]: memory3 bank compact my.bank")
def compact(bank: BankArgument) -> None:
    """Give the space of deleted records back to the disk."""
    from ..bank import Bank

    with Bank.open(bank, write=True) as store:
        out.print(f"freed {human_bytes(store.compact())}")


@app.command(epilog="[bold]Example[/bold]: memory3 bank export my.bank my.m3")
def export(bank: BankArgument, file: FileArgument) -> None:
    """Write the whole bank into one file, to carry elsewhere."""
    from ..bank import Bank

    with Bank.open(bank) as store:
        out.print(f"{store.export(file)} references written to {file}")


@app.command("import", epilog="[bold]Example[/bold]: memory3 bank import my.m3 copy.bank")
def import_(file: FileArgument, bank: BankArgument) -> None:
    """Make a new bank from an exported file."""
    from ..bank import Bank

    with Bank.import_(file, bank) as store:
        out.print(f"{len(store)} references in {bank}")


@app.command(epilog="[bold]Example[/bold]: memory3 bank salvage broken.bank saved.bank")
def salvage(
    bank: BankArgument,
    target: Annotated[Path, typer.Argument(help="Folder of the new bank.")],
) -> None:
    """Copy every record that can still be read from a damaged bank into a new one."""
    from ..bank import salvage as run

    found = run(bank, target)
    err.print(f"{found} references saved to {target}")
