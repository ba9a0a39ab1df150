"""The command table."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bank, calibrate, chat, demo, doctor, eval, generate, inspect, search, theory, train, write


def version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"memory3 {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="memory3",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def top(
    show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Explicit memory for language models: write references once, retrieve and read them while generating."""


for command in (write, search, generate, chat, inspect, calibrate, train, eval, theory, doctor, demo):
    app.command(name=command.__name__.rpartition(".")[2], epilog=command.EXAMPLES)(command.run)
app.add_typer(bank.app, name="bank")
