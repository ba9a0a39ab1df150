"""Decode speed of explicit memory against RAG, full key-value reuse and llama.cpp, on the same bank and questions.

SmolLM2-135M, greedy, 128 tokens in and 128 out, throughput over the whole time (Memory3, Table 21). One run of each arm
per round, every round with other questions, another arm first each time. Protocols:
  warm    slots cached as previous rounds left them, and after --prepare the records' pages in RAM; all arms
  worst   every memory of a run is another one, slots emptied and the bank's pages evicted before it; the arms that read
          records, beside the plain loop
A file given with --json is gone on with: rounds it has are kept, so that a measurement may be taken in slices
(--minutes). Memories are written when they are first retrieved; --prepare does it beforehand and brings their pages
into RAM, and a run that has to write some is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .. import ceilings, corpus, environment
from ..measure import threads
from ..peers.llama import LlamaCpp
from ..report import progress
from ..rivals.full_kv import full_kv_model
from . import arms, banks, summary
from .arms import ABOUT, PROTOCOLS, Setting
from .record import Record
from .show import show, show_break_evens, show_gates

MODEL = corpus.MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers here, and go on with what is there")
    parser.add_argument("--weights", nargs="+", choices=("dense", "checkpoint"), default=["dense", "checkpoint"])
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="default: both")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="default 1 4 8")
    parser.add_argument("--refs", type=int, nargs="+", default=[5, 10], help="references per retrieval (default 5 10)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in and tokens out (default 128)")
    parser.add_argument("--runs", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--arms", nargs="+", choices=ABOUT, default=list(ABOUT), help="default: all")
    corpus.add_format_arguments(parser)
    parser.add_argument("--references", type=int, default=20_000, help="references in the bank (default 20000)")
    parser.add_argument("--bank", metavar="DIR", type=Path, help="of the references (default: in the cache folder)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no round that would end later")
    parser.add_argument(
        "--others",
        type=float,
        default=0.1,
        help="drop rounds in which other processes took more of the processors "
        "(default 0.1); the next call makes them again",
    )
    parser.add_argument("--prepare", action="store_true", help="write every record that will be read; time nothing")
    parser.add_argument("--peak-memory", action="store_true", help="peak memory, each arm in a process of its own")
    parser.add_argument("--one-arm", help=argparse.SUPPRESS)  # what --peak-memory starts
    parser.add_argument("--llama-python", metavar="FILE", help="interpreter with llama-cpp-python (default: without)")


def main(args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    settings = [
        Setting(weights, protocol, batch, refs, args.threads, args.tokens)
        for weights, refs, batch, protocol in itertools.product(args.weights, args.refs, args.batch, args.protocol)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads(args.threads))
        ground = stack.enter_context(Ground(args))
        if args.one_arm:
            return _print_peak(ground, settings[0], args.one_arm)
        # Each process of --peak-memory opens the banks for itself: this one must not hold their locks.
        about = {} if args.peak_memory else ground.settings()
        record = Record(args.json, about, environment.describe())
        for setting in settings:
            if args.prepare:
                prepare(ground, setting, args)
            elif args.peak_memory:
                _peaks(record, setting, args)
            elif not measure(ground, setting, record, args, end):
                break
        rows = summary.rows(record)
        show(rows)
        show_gates(summary.gates(rows))
        show_break_evens(summary.break_evens(rows, record.about))
    return 0


class Ground:
    """What the settings share, made when it is first needed: models by weights, banks, questions, llama.cpp."""

    def __init__(self, args: argparse.Namespace, load=None, embedder=None) -> None:
        self.args, self._load, self._embedder = args, load, embedder
        self._models: dict[str, Any] = {}
        self._open = contextlib.ExitStack()
        self._banks: arms.Banks | None = None
        self._peer: LlamaCpp | None = None

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def model(self, weights: str):
        if weights not in self._models:
            self._models[weights] = corpus.load(self.args, weights, self._load)
        return self._models[weights]

    @property
    def embedder(self):
        from memory3 import Embedder

        self._embedder = self._embedder or Embedder()
        return self._embedder

    @property
    def banks(self) -> arms.Banks:
        """The references dense, coded and with full key-values; a bank that is missing is made, without memories."""
        if self._banks is None:
            args, model = self.args, self.model(self.args.weights[0])
            folder = args.bank or corpus.default_folder(args.references, model)
            source = self._open.enter_context(
                corpus.open_bank(folder, model, self.embedder, args.references, _progress)
            )

            def sibling(name: str, model=model, codec=None):
                beside = folder.with_name(f"{folder.name}-{args.references}-{name}")
                return self._open.enter_context(banks.sibling(beside, model, source, args.references, codec))

            self._banks = arms.Banks(
                source if len(source) == args.references else sibling("dense"),
                sibling("vq", codec=lambda: banks.train(model, source, banks.codec_spec(model.config.head_dim))),
                sibling("full", full_kv_model(model)),
            )
        return self._banks

    def prompts(self, batch: int, number: int) -> list[list[int]]:
        """Questions of a round; kept beside the bank, since finding them means reading the whole corpus."""
        args = self.args
        folder = args.bank or corpus.default_folder(args.references, self.model(args.weights[0]))
        file = folder.with_name(f"{folder.name}-prompts-{args.tokens}-{args.runs * max(args.batch)}.json")
        if not file.is_file():
            model = self.model(args.weights[0])
            found = corpus.prompts(model, args.runs * max(args.batch), args.tokens, args.references)
            file.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(file.read_text(encoding="utf-8"))
        return found[number * batch : (number + 1) * batch]

    def peer(self, setting: Setting) -> LlamaCpp | None:
        """llama.cpp with room for the longest prompt of any setting, where the setting has it."""
        args = self.args
        if not args.llama_python or not arms.llama_runs(setting):
            return None
        if self._peer is None:
            from memory3.model.load import preset_path

            memory = self.model(setting.weights).memory
            room = max(args.refs) * (memory.span + memory.prefix_len) + 2 * args.tokens + 64
            peer = LlamaCpp(args.llama_python, preset_path(MODEL), setting.threads, room)
            self._peer = self._open.enter_context(peer)
        return self._peer

    def arms(self, setting: Setting, names) -> dict[str, arms.Arm]:
        return arms.build(setting, self.model(setting.weights), self.banks, self.embedder, names, self.peer(setting))

    def settings(self) -> dict[str, Any]:
        model = self.model(self.args.weights[0])
        memory, dense = model.memory, self.banks.dense
        return {
            "model": MODEL, "references": len(dense), "reference_tokens": memory.span, "chunk": memory.chunk,
            "memory_layers": len(memory.layers), "memory_tokens": memory.tokens,
            "record_bytes": {
                "memory": dense.layout.record_bytes, "memory-vq": self.banks.coded.layout.record_bytes,
                "full-kv": self.banks.full.layout.record_bytes,
            },
            "llama_cpp": self._peer.about if self._peer else None,
        }  # fmt: skip


def measure(ground: Ground, setting: Setting, record: Record, args: argparse.Namespace, end: float) -> bool:
    """Runs the rounds that the record lacks; False: the time is up."""
    found = ground.arms(setting, args.arms)
    missing = record.missing(setting, found, args.runs)
    if not missing:
        return True
    _describe(ground, setting, record)
    for arm in found.values():  # caches of code and tables, not of records
        arm.before()
        arm.run(ground.prompts(setting.batch, 0)[:1], 2)
    longest = max(
        (sum(r["wall_s"] for r in each) for each in zip(*record.of(setting).values(), strict=True)), default=0
    )
    names = list(found)
    with progress(setting.key, len(missing) * len(names)) as step:
        for number in missing:
            if time.monotonic() + longest > end:
                return False
            begin = time.monotonic()
            shift = number % len(names)
            prompts = ground.prompts(setting.batch, number)
            seen = {
                name: step(arms.timed(found[name], prompts, setting.tokens)) for name in names[shift:] + names[:shift]
            }
            longest = max(longest, time.monotonic() - begin)
            others, during = max((run["others"], name) for name, run in seen.items())
            if others > args.others:
                print(f"round {number} does not count: others took {others:.0%} of the processors during {during}")
                continue
            record.add(setting, number, {name: seen[name] for name in names})
            record.settings |= ground.settings()
            record.save(summary.rows)
    return True


def prepare(ground: Ground, setting: Setting, args: argparse.Namespace) -> None:
    """Runs what reads records, untimed, as far as the last retrieval: afterwards every record is in its bank."""
    found = ground.arms(setting, [name for name in arms.LOADING if name in args.arms])
    changes = (setting.tokens - 1) // ground.model(setting.weights).memory.chunk
    last = changes * ground.model(setting.weights).memory.chunk + 2
    with progress(f"preparing: {setting.key}", args.runs * len(found)) as step:
        for number in range(args.runs):
            for name, arm in found.items():
                arm.before()
                step(arm.run(ground.prompts(setting.batch, number), 1 if name == "full-kv" else last))


def _describe(ground: Ground, setting: Setting, record: Record) -> None:
    """Ceilings, weights and seconds of writing, once per weights and threads."""
    key = f"{setting.weights}, {setting.threads} threads"
    if key in record.about:
        return
    from dataclasses import asdict

    from .. import loop

    model = ground.model(setting.weights)
    record.about[key] = {
        "ceilings": asdict(ceilings.measure(setting.threads)),
        "device_gb_s": banks.device_rate(ground.banks.dense.path / "data.mdb"),
        "weight_bytes": loop.weight_bytes(model),
        "write_s": banks.write_seconds(model, ground.banks),
    }


def _peaks(record: Record, setting: Setting, args: argparse.Namespace) -> None:
    for name in arms.served(setting, args.arms, bool(args.llama_python)):
        if name in record.peak.get(setting.key, {}):
            continue
        line = [sys.executable, "-m", "bench", "decode", "--one-arm", name, "--weights", setting.weights,
                "--protocol", setting.protocol, "--batch", setting.batch, "--refs", setting.refs,
                "--threads", setting.threads, "--tokens", setting.tokens, "--runs", args.runs,
                "--references", args.references]  # fmt: skip
        line += ["--bank", args.bank] if args.bank else []
        line += ["--llama-python", args.llama_python] if args.llama_python else []
        done = subprocess.run([str(part) for part in line], stdout=subprocess.PIPE, text=True, check=True)
        record.peak.setdefault(setting.key, {})[name] = json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"]
        record.save(summary.rows)


def _print_peak(ground: Ground, setting: Setting, name: str) -> int:
    arm = ground.arms(setting, [name])[name]
    arm.before()
    print(json.dumps(arms.peak_memory(arm, ground.prompts(setting.batch, 0), setting.tokens)))
    return 0


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        sys.stderr.write(f"\rreferences in the bank: {done}/{total}" + ("\n" if done == total else ""))
