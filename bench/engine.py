"""Decoding with retrieval every 64 tokens against the same engine without memory.

SmolLM2-135M, greedy, fixed length. Arms, one run of each per round:
  none    the plain model
  warm    memory; the records of these prompts are in the arena already (search is done all the same)
  cold    memory; the arena is emptied before each run, every record is copied from the bank again
  disk    as cold, and the bank's pages are evicted before each run: every record comes from the device (`read_bytes`)
  rag     the same references as text in front of the prompt, retrieved once
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

from . import corpus, environment
from .evict import device_bytes, evict
from .report import document, mebibytes, show_table, write_json
from .timing import Summary, interleave, ratios

ARMS = ("none", "warm", "cold", "disk", "rag")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--runs", type=int, default=9, help="rounds, one run of each arm (default 9)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of torch (default 1)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in and tokens out (default 128)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument(
        "--weights",
        choices=("auto", "dense", "checkpoint"),
        default="auto",
        help="as load_model takes it (default auto)",
    )
    corpus.add_format_arguments(parser)
    parser.add_argument("--references", type=int, default=2000, help="references in the bank (default 2000)")
    parser.add_argument(
        "--bank", metavar="DIR", type=Path, help="keep the bank here (default: the user's cache folder)"
    )


def main(args: argparse.Namespace) -> int:
    import torch

    from memory3 import Embedder

    model, embedder = corpus.load(args, args.weights), Embedder()
    folder = args.bank or corpus.default_folder(args.references, model)
    rows: list[dict[str, Any]] = []
    with corpus.open_bank(folder, model, embedder, args.references, _progress) as bank:
        held = len(bank)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                prompts = corpus.prompts(model, batch, args.tokens, args.references)
                rows += measure(model, bank, embedder, prompts, args.tokens, args.runs, args.arms, threads)
                show(rows[-len(args.arms) :], batch, threads)
    settings = {
        "model": corpus.MODEL, "weights": args.weights, "tokens_in": args.tokens, "tokens_out": args.tokens,
        "references": held, "reference_tokens": model.memory.span, "refs": model.memory.refs,
        "chunk": model.memory.chunk, "memory_layers": len(model.memory.layers), "memory_tokens": model.memory.tokens,
    }  # fmt: skip
    if args.json:
        write_json(args.json, document("engine", settings, environment.describe(), rows))
    return 0


def measure(model, bank, embedder, prompts, tokens: int, runs: int, names, threads: int) -> list[dict[str, Any]]:
    """One row per arm."""
    from memory3 import Engine

    slots = 2 * model.memory.refs * len(prompts) * (1 + tokens // model.memory.chunk)
    engines = {
        "none": Engine(model, mode="none"),
        "warm": Engine(model, bank, embedder, slots=slots),
        "cold": Engine(model, bank, embedder, slots=slots),
        "disk": Engine(model, bank, embedder, slots=slots),
        "rag": Engine(model, bank, embedder, mode="rag"),
    }

    def run(name: str) -> dict[str, Any]:
        engine = engines[name]
        if name in ("cold", "disk"):
            engine.arena.clear()
        if name == "disk":
            evict(bank.path / "data.mdb")
        gc.collect()
        read = device_bytes()
        begin, cpu = time.perf_counter(), time.process_time()
        stats = engine.generate(prompts, max_new_tokens=tokens, ignore_eos=True)[0].stats
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        read = device_bytes() - read
        return {**stats.to_dict(), "wall_s": wall, "cpu_s": cpu, "read": read, "load": environment.load_average()}

    seen = interleave({name: lambda name=name: run(name) for name in names}, runs)
    about = {"batch": len(prompts), "threads": threads}
    chunks = len(prompts) * 2 * tokens / model.memory.chunk
    return [{"arm": name, **about, **summary(seen[name], seen.get("none"), chunks)} for name in names]


def summary(runs: list[dict], base: list[dict] | None, chunks: float) -> dict[str, Any]:
    """Medians over the runs of one arm; the ratio is that of throughputs to `base`, round by round.

    cpu_s and cpu_ratio count this process's processor time alone: what others took from a shared machine is left out.
    """

    def median(key: str) -> float:
        return Summary.of(r[key] for r in runs).median

    speed = Summary.of(r["new_tokens"] / r["wall_s"] for r in runs)
    ratio = Summary.of(ratios([b["wall_s"] for b in base], [r["wall_s"] for r in runs])) if base else None
    cpu_ratio = Summary.of(ratios([b["cpu_s"] for b in base], [r["cpu_s"] for r in runs])) if base else None
    stages = sorted({stage for r in runs for stage in r["times"]})
    return {
        "runs": len(runs),
        "tokens_per_s": speed.median,
        "tokens_per_s_low": speed.low,
        "tokens_per_s_high": speed.high,
        "ratio": ratio.median if ratio else None,
        "ratio_low": ratio.low if ratio else None,
        "ratio_high": ratio.high if ratio else None,
        "cpu_ratio": cpu_ratio.median if cpu_ratio else None,
        "wall_s": median("wall_s"),
        "cpu_s": median("cpu_s"),
        "ttft_s": median("ttft_s"),
        "kv_bytes": median("kv_bytes"),
        "retrievals": median("retrievals"),
        "bytes_loaded": median("bytes_loaded"),
        "bytes_per_chunk": median("bytes_loaded") / chunks,
        "device_bytes": median("read"),
        "stages": {stage: Summary.of(r["times"].get(stage, 0.0) for r in runs).median for stage in stages},
        "load_average": Summary.of(r["load"] for r in runs).median,
    }


def show(rows: list[dict], batch: int, threads: int) -> None:
    columns = (
        "arm",
        "tokens/s",
        "ratio",
        "quartiles",
        "CPU ratio",
        "total",
        "first",
        "KV each",
        "loaded/chunk",
        "from device",
        "load",
    )
    lines = [
        (
            r["arm"],
            f"{r['tokens_per_s']:.1f}",
            f"{r['ratio']:.3f}" if r["ratio"] else "",
            f"{r['ratio_low']:.3f}-{r['ratio_high']:.3f}" if r["ratio"] else "",
            f"{r['cpu_ratio']:.3f}" if r["cpu_ratio"] else "",
            f"{r['wall_s']:.3f} s",
            f"{r['ttft_s'] * 1000:.0f} ms",
            mebibytes(r["kv_bytes"]),
            mebibytes(r["bytes_per_chunk"]),
            mebibytes(r["device_bytes"]),
            f"{r['load_average']:.2f}",
        )
        for r in rows
    ]
    show_table(f"batch {batch}, {threads} thread(s), median of {rows[0]['runs']} runs", columns, lines)
    names = sorted({s for r in rows for s in r["stages"]}, key=lambda s: -max(r["stages"].get(s, 0) for r in rows))
    stages = [(r["arm"], *(f"{r['stages'].get(s, 0) * 1000:.1f}" for s in names)) for r in rows]
    show_table("milliseconds by stage", ("arm", *names), stages)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        sys.stderr.write(f"\rreferences in the bank: {done}/{total}" + ("\n" if done == total else ""))
