"""memory3 generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT_MODEL,
    JsonOption,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    load,
    out,
    print_json,
    set_threads,
)
from .show import show_profile, show_reads, show_stats

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 generate "The capital of France is" -n 20\n
memory3 generate "Question: What is the capital of Fiji?\\nAnswer:" --bank my.bank --reads --stats\n
memory3 generate "Who wrote it?" --memory "The opera Zaide was written by Mozart."\n
echo "Tell me about tides" | memory3 generate - --bank my.bank --json
"""


def run(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    bank: Annotated[Path | None, typer.Option("--bank", "-b", help="Folder of a bank to read memories from.")] = None,
    memory: Annotated[
        list[str] | None, typer.Option("--memory", help="A text to read as memory (repeatable); needs no bank.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="memory, rag (references as text in the prompt) or none. Default: memory.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens at most.")] = 64,
    refs: Annotated[int | None, typer.Option(help="References per retrieval (default: 5).")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text (repeatable).")] = None,
    overflow: Annotated[str, typer.Option(help="A full context: error, or slide (oldest tokens fall out).")] = "error",
    prefetch: Annotated[int, typer.Option(help="Retrieve for the next chunk this many tokens early; 0: exact.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    reads: Annotated[bool, typer.Option("--reads", help="Show the references read, with attention mass.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show tokens/s, bytes, and where the time went.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the time by what was computed: linear, attention, embed, search ...")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "auto",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, with memories from a bank, from texts given here, or with none."""
    from ..bank import Bank
    from ..engine import Engine
    from ..sampling import Sampling

    if memory and bank:
        raise typer.BadParameter("--memory and --bank exclude each other: give texts or a bank")
    if memory and (stop or chat or reads or stats or profile or top_k or top_p != 1.0):
        raise typer.BadParameter(
            "--memory goes with --tokens, --temperature, --seed and --overflow only; write a bank for the other options"
        )
    set_threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n")
    store = Bank.open(bank) if bank is not None else None
    net = load(model, as_json, store.identity if store else None, weights)
    if memory:
        return by_hand(net, text, memory, tokens, temperature, seed, overflow, as_json)
    engine = Engine(net, store, mode=mode, refs=refs, prefetch=prefetch)
    ids = net.tokenizer.chat([{"role": "user", "content": text}]) if chat else net.tokenizer.encode(text)
    on_text = None
    if not as_json:
        if not chat:
            out.print(text, end="", style="dim", markup=False, soft_wrap=True)
        on_text = lambda _, piece: out.print(piece, end="", markup=False, soft_wrap=True)  # noqa: E731
    result = engine.generate(
        [ids],
        max_new_tokens=tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop=tuple(s.replace("\\n", "\n") for s in stop or ()),
        overflow=overflow,
        collect_mass=reads or as_json,
        on_text=on_text,
        profile=profile,
    )[0]
    if as_json:
        document = result.to_dict()
        for read in document["reads"]:
            read["texts"] = [store.text(bytes.fromhex(i)) for i in read["ids"]]
        print_json(document)
        return
    out.print()
    if reads:
        show_reads(result.reads, store)
    if stats:
        show_stats(result.stats)
    if profile:
        show_profile(result.stats)


def by_hand(net, text: str, texts: list[str], tokens, temperature, seed, overflow: str, as_json: bool) -> None:
    """Every token reads the memories of the given texts: no bank, no retriever."""
    options = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed, "overflow": overflow}
    answer = net.generate(text, memories=net.write(texts), **options)
    if as_json:
        print_json({"text": answer, "memories": texts})
    else:
        out.print(text, end="", style="dim", markup=False, soft_wrap=True)
        out.print(answer, markup=False, soft_wrap=True)
