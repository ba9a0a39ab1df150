"""What several commands share: consoles, options, loading, and errors that say what to do."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A preset (smollm2-135m), a .gguf file, or a Hugging Face folder.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="Weights of linear layers: auto, checkpoint (a GGUF's own blocks), dense (bf16), q8_0 or q4_1. "
        "auto: the blocks where there are some."
    ),
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


def load(model: str, quiet: bool = False, identity=None, weights: str = "auto", **overrides):
    """The model, with a spinner on a terminal.

    weights: as load_model takes them.
    identity: a bank's; the model then reads memory as the bank was written.
    overrides: fields of MemoryConfig to replace (None: keep).
    """
    from dataclasses import replace

    from .. import load_model

    with nullcontext() if quiet or not err.is_terminal else err.status(f"loading {model}"):
        loaded = load_model(model, weights=weights)
    memory = identity.memory_config() if identity is not None else loaded.memory
    memory = replace(memory, **{name: value for name, value in overrides.items() if value is not None})
    if memory == loaded.memory:
        return loaded
    return loaded.with_memory(memory)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
