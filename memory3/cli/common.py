"""What several commands share: consoles, options, loading, and errors that say what to do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A preset (smollm2-135m), a .gguf file, or a Hugging Face folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ThreadsOption = Annotated[int, typer.Option("--threads", "-t", help="Threads to compute with; 0: torch's own choice.")]
BankArgument = Annotated[Path, typer.Argument(help="Folder of the bank.")]
DEFAULT_MODEL = "smollm2-135m"


def report(error: Exception) -> bool:
    """Prints an expected error in one line; False for one that deserves its traceback."""
    from ..arena import SlotsExhausted
    from ..bank.errors import BankError
    from ..model.cache import ContextFull

    expected = (BankError, ContextFull, SlotsExhausted, FileNotFoundError, PermissionError, ValueError, typer.Exit)
    if not isinstance(error, expected) or os.environ.get("M3_TRACEBACK"):
        return False
    err.print(f"[red]error:[/red] {error}", markup=True, soft_wrap=True)
    return True


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def load(model: str, quiet: bool = False):
    """The model, with a spinner on a terminal."""
    from .. import load_model

    if quiet or not err.is_terminal:
        return load_model(model)
    with err.status(f"loading {model}"):
        return load_model(model)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
