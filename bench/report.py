"""Results as a JSON file and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Result = TypeVar("Result")

SCHEMA = 2


def document(
    suite: str, settings: dict[str, Any], environment: dict[str, Any], rows: Sequence[dict], **more: Any
) -> dict[str, Any]:
    """What every suite writes: rows are flat, one per measured thing; `more` holds what is said once per run."""
    return {
        "schema": SCHEMA, "suite": suite, "settings": settings, "environment": environment, **more, "rows": list(rows),
    }  # fmt: skip


def write_json(path: str | Path, report: dict[str, Any]) -> None:
    """Whole or not at all: long measurements go on with what an interrupted one left."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """First column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(180, Console().width)).print(table)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[Result], Result]]:
    """A bar on standard error; what it yields counts one and hands its argument back."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def count(result: Result) -> Result:
            bar.advance(task)
            return result

        yield count


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
