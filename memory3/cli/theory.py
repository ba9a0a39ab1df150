"""memory3 theory"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.table import Table

from ..config import layer_list
from .common import JsonOption, out, print_json

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 theory\n
memory3 theory smollm2-135m --tokens 8\n
memory3 theory smollm2-135m --seconds 0.066,0.0001,0.12\n
"""


def run(
    model: Annotated[
        str, typer.Argument(help="A preset (paper-2.4b, smollm2-135m), a .gguf file, or a Hugging Face folder.")
    ] = "paper-2.4b",
    tokens: Annotated[int | None, typer.Option(help="Tokens kept per head (default: the model's).")] = None,
    layers: Annotated[str | None, typer.Option(help="Memory layers, such as 0-21 (default: the model's).")] = None,
    reference: Annotated[int | None, typer.Option(help="Tokens of a reference (default: the model's span).")] = None,
    seconds: Annotated[
        str | None,
        typer.Option(help="Measured: WRITE,READ,RAG seconds per reference (python -m bench decode prints them)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What one reference costs as weights, as memory and as text, and from how many uses on memory pays."""
    from ..theory import Cost, advantage, break_even, costs

    config, memory = shapes(model)
    changes = {"tokens": tokens, "layers": layer_list(layers), "span": reference}
    memory = replace(memory, **{name: value for name, value in changes.items() if value is not None})
    memory.check(config)
    found = costs(config, memory)
    low, high = advantage(found)
    measured = None
    if seconds is not None:
        write, read, rag = three(seconds)
        measured = {
            "write_s": write, "read_s": read, "rag_s": rag, "uses": break_even(Cost(write, read), Cost(0, rag)),
        }  # fmt: skip
    if as_json:
        return print_json(
            {
                "model": model,
                "flops": {name: asdict(cost) for name, cost in found.items()},
                "explicit_from_uses": low,
                "explicit_to_uses": high,
                "measured": measured,
            }
        )
    table = Table("format", "write, TFlops", "read per use, TFlops", title=f"one reference of {memory.span} tokens")
    for name, cost in found.items():
        table.add_row(name, f"{cost.write / 1e12:.3g}", f"{cost.read / 1e12:.3g}")
    out.print(table)
    out.print(
        f"explicit memory is the cheapest from {low:.3g} to {high:,.0f} uses"
        if low < high
        else "explicit memory is never the cheapest here"
    )
    if measured is not None:
        out.print(f"by the measured seconds it pays against text from {measured['uses']:.3g} uses on")


def shapes(model: str):
    """(ModelConfig, MemoryConfig) without loading weights."""
    from ..config import PRESETS

    if model in PRESETS:
        return PRESETS[model].model, PRESETS[model].memory
    from ..model.load import default_memory, open_checkpoint

    checkpoint, memory = open_checkpoint(model)
    return checkpoint.config, memory or default_memory(checkpoint.config, checkpoint.tokenizer())


def three(text: str) -> list[float]:
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != 3 or min(values) < 0:
        raise ValueError(f"seconds: expected WRITE,READ,RAG such as 0.07,0.0001,0.12, got {text!r}")
    return values
