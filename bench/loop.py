"""The plain decode loop: prefill, then one token per step, against the memory's bandwidth and llama.cpp.

SmolLM2-135M, greedy, fixed length, batch 1 and 8. Arms, one run of each per round:
  checkpoint   the GGUF file's own blocks (Q4_1, Q8_0)
  dense        bfloat16 weights
  llama.cpp    the same file and threads, batch 1, with --llama-python
Throughput is generated tokens over the whole time, prefill included.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import ceilings, corpus, environment
from .measure import threads
from .peers.llama import LlamaCpp
from .report import document, progress, show_table, write_json
from .timing import Summary, interleave, ratios

WEIGHTS = ("checkpoint", "dense")
AFTER = 2000  # references of the corpus before the prompts, as in the other suites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--runs", type=int, default=9, help="rounds, one run of each arm (default 9)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="threads (default 2)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in and tokens out (default 128)")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: both")
    parser.add_argument(
        "--llama-python", metavar="FILE", help="interpreter with llama-cpp-python (default: leave llama.cpp out)"
    )


def main(args: argparse.Namespace) -> int:
    from memory3 import load_model
    from memory3.model.load import preset_path

    source = preset_path("smollm2-135m")
    models = {weights: load_model("smollm2-135m", weights=weights) for weights in args.weights}
    prompts = corpus.prompts(next(iter(models.values())), max(args.batch), args.tokens, AFTER)
    rows: list[dict[str, Any]] = []
    tops, about = [], None
    for count in args.threads:
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads(count))
            tops.append(ceilings.measure(count))
            peer = None
            if args.llama_python:
                peer = stack.enter_context(LlamaCpp(args.llama_python, source, count, 2 * args.tokens + 64))
                about = peer.about
            found = measure(models, peer, prompts, args.batch, args.tokens, args.runs, tops[-1])
        show(found, tops[-1])
        rows += found
    if args.json:
        settings = {"model": source.name, "tokens_in": args.tokens, "tokens_out": args.tokens, "runs": args.runs}
        more = {"ceilings": [asdict(top) for top in tops], "llama_cpp": about}
        write_json(args.json, document("loop", settings, environment.describe(), rows, **more))
    return 0


def measure(
    models: dict, peer: LlamaCpp | None, prompts: Sequence, batches: Sequence[int], tokens: int, runs: int,
    top: ceilings.Ceilings,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per arm; `ratio` is to llama.cpp's throughput where it ran, `batch_ratio` to the same arm at batch 1."""
    arms = {
        (name, batch): lambda model=model, part=prompts[:batch]: run(model, part, tokens)
        for name, model in models.items()
        for batch in batches
    }
    if peer is not None:
        arms["llama.cpp", 1] = lambda: peer_run(peer, prompts[0], tokens)
    with progress("rounds", (runs + 1) * len(arms)) as step:
        seen = interleave({key: lambda arm=arm: step(arm()) for key, arm in arms.items()}, runs)
    rates = {key: [key[1] * tokens / r["total_s"] for r in found] for key, found in seen.items()}
    read = {name: weight_bytes(model) for name, model in models.items()}
    rows = []
    for (name, batch), found in seen.items():
        rate, base, single = Summary.of(rates[name, batch]), rates.get(("llama.cpp", 1)), rates.get((name, 1))
        step_s = Summary.of(r["decode_s"] / (tokens - 1) for r in found).median
        beside = None if base is None else ratios(rates[name, batch], base)
        bandwidth = read[name] / step_s / 1e9 if name in read else None
        rows.append(
            {
                "arm": name,
                "batch": batch,
                "threads": top.threads,
                "runs": runs,
                "tokens_per_s": rate.median,
                "tokens_per_s_low": rate.low,
                "tokens_per_s_high": rate.high,
                "prefill_tokens_per_s": batch * tokens / Summary.of(r["prefill_s"] for r in found).median,
                "decode_tokens_per_s": batch / step_s,
                "step_ms": step_s * 1e3,
                "total_s": Summary.of(r["total_s"] for r in found).median,
                "weight_bytes": read.get(name),
                "gb_per_s": bandwidth,
                "read_share": None if bandwidth is None else bandwidth / top.read_gb_s,
                "ratio": None if beside is None else Summary.of(beside).median,
                "batch_ratio": None if single is None else Summary.of(ratios(rates[name, batch], single)).median,
                "load": environment.load_average(),
            }
        )
    return rows


def run(model, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
    from memory3 import Engine

    stats = Engine(model, mode="none").generate(prompts, max_new_tokens=tokens, ignore_eos=True)[0].stats
    return {"total_s": stats.total_s, "prefill_s": stats.ttft_s, "decode_s": stats.total_s - stats.ttft_s}


def peer_run(peer: LlamaCpp, prompt: Sequence[int], tokens: int) -> dict[str, float]:
    seen = peer.generate(prompt, tokens)
    return {**seen, "total_s": seen["prefill_s"] + seen["decode_s"]}


def weight_bytes(model) -> int:
    """What a decode step reads of the weights, at least."""
    from memory3.model.layers import Linear

    found = [module for module in model.net.modules() if isinstance(module, Linear)]
    return sum(one.packed.data.nbytes if one.packed is not None else one.weight.nbytes for one in found)


def show(rows: list[dict[str, Any]], top: ceilings.Ceilings) -> None:
    lines = [
        (
            f"{r['arm']}, batch {r['batch']}",
            f"{r['tokens_per_s']:.1f}",
            f"{r['tokens_per_s_low']:.1f}-{r['tokens_per_s_high']:.1f}",
            f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['decode_tokens_per_s']:.1f}",
            f"{r['step_ms']:.2f}",
            f"{r['gb_per_s']:.1f}" if r["gb_per_s"] else "",
            f"{r['read_share']:.0%}" if r["read_share"] else "",
            f"{r['ratio']:.2f}" if r["ratio"] else "",
            f"{r['batch_ratio']:.2f}" if r["batch_ratio"] else "",
        )
        for r in rows
    ]
    columns = ("arm", "tokens/s", "quartiles", "prefill", "decode", "ms/step", "GB/s", "of reads", "to llama.cpp",
               "to batch 1")  # fmt: skip
    title = (
        f"{top.threads} thread(s), medians of {rows[0]['runs']} runs; pure reads {top.read_gb_s:.1f} GB/s; "
        f"load {environment.load_average():.1f}"
    )
    show_table(title, columns, lines)
