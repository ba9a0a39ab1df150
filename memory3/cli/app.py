"""The command table."""

from __future__ import annotations

import typer

from . import bank, calibrate, chat, demo, doctor, generate, inspect, search, write

app = typer.Typer(
    name="memory3",
    help="Explicit memory for language models: write references once, retrieve and read them while generating.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (write, search, generate, chat, inspect, calibrate, doctor, demo):
    app.command(name=command.__name__.rpartition(".")[2], epilog=command.EXAMPLES)(command.run)
app.add_typer(bank.app, name="bank")
