"""Regression gate: are the ops of one commit slower than those of another, beyond the noise?

Both commits are exported into a folder of their own, built and timed in turns on the same machine. Exit status 1: a
confident loss (see gate.py), 0: none. --self-test measures the gate itself: false alarms of this tree against itself,
and how often a planted slowdown of 10 % is found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from .. import environment
from ..report import SCHEMA, document, progress, write_json
from . import gate, selftest, sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", nargs="?", default="HEAD~1", help="commit compared with (default HEAD~1)")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit that must not be slower (default HEAD)")
    parser.add_argument("--case", metavar="TEXT", nargs="+", default=[""], help="only cases that contain one of these")
    parser.add_argument(
        "--suite", choices=("smoke", "cpu"), default="cpu", help="smoke: of each op the first by name (default: cpu)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="of a look at a case (default 9)")
    parser.add_argument("--relative", type=float, default=0.05, help="smallest loss that counts (default 0.05)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here too (as for a pull request)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers here; --self-test goes on with what is there")
    parser.add_argument("--self-test", action="store_true", help="measure false alarms and detection of this tree")
    parser.add_argument("--comparisons", type=int, default=selftest.COMPARISONS, help="with itself (default 200)")
    parser.add_argument("--planted", type=int, default=20, help="comparisons with all cases slowed (default 20)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="--self-test: stop after so long")


def main(args: argparse.Namespace) -> int:
    limits = gate.Limits(relative=args.relative, rounds=args.rounds)
    if args.self_test:
        return self_test(args, limits)
    with tempfile.TemporaryDirectory(prefix="memory3-compare-") as folder, contextlib.ExitStack() as stack:
        trees = []
        for name, ref in (("base", args.base), ("head", args.head)):
            trees.append(sides.export(ref, Path(folder) / name))
            print(f"building {ref}", flush=True)
            sides.build(trees[-1])
        workers = stack.enter_context(sides.Workers(*trees, threads=args.threads))
        started = workers.fresh()
        both = [case for case in started["head"].cases if case in started["base"].cases]
        only = sorted(set(started["head"].cases) ^ set(started["base"].cases))
        cases = chosen(both, args)
        with progress("cases", len(cases)) as step:
            changes = gate.compare(cases, workers.fresh, limits, step)
    table = gate.markdown(changes, args.base, args.head, only)
    print(table)
    if args.markdown:
        Path(args.markdown).write_text(table, encoding="utf-8")
    if args.json:
        settings = {"base": args.base, "head": args.head, "threads": args.threads, **asdict(limits)}
        rows = [asdict(change) for change in changes]
        write_json(args.json, document("compare", settings, environment.describe(), rows))
    return int(any(change.loss for change in changes))


def chosen(cases: list[str], args: argparse.Namespace) -> list[str]:
    """Raises SystemExit where nothing is left."""
    found = [case for case in cases if any(part in case for part in args.case)]
    if args.suite == "smoke":
        found = sorted({case.split("/")[0]: case for case in sorted(found, reverse=True)}.values())
    if not found:
        raise SystemExit(f"--case: expected part of a benchmark case's name, got {' '.join(args.case)!r}")
    return found


def self_test(args: argparse.Namespace, limits: gate.Limits) -> int:
    """Exit status 1: more than 1 % false alarms, or fewer than 95 % of the planted slowdowns found."""
    found: dict[str, list] = {"self": [], "planted": []}
    path = Path(args.json) if args.json else None
    with sides.WorkerSide(sides.ROOT, args.threads) as side:
        cases = chosen(side.cases, args)
    settings = {"threads": args.threads, "cases": cases, **asdict(limits)}
    if path is not None and path.is_file():
        read = json.loads(path.read_text(encoding="utf-8"))
        if (read.get("suite"), read.get("schema"), read.get("settings")) != ("compare self-test", SCHEMA, settings):
            raise SystemExit(f"{path}: expected results of bench compare --self-test with the same settings")
        found = read["comparisons"]

    def save() -> None:
        if path is not None:
            rows = [selftest.summary(found, cases)]
            write_json(path, document("compare self-test", settings, environment.describe(), rows, comparisons=found))

    end = time.monotonic() + 60 * args.minutes
    selftest.run(found, cases, sides.ROOT, limits, args.threads, args.comparisons, args.planted, end, save)
    seen = selftest.summary(found, cases)
    print(
        f"{seen['false_alarms']} false alarms in {seen['comparisons']} comparisons of {seen['cases']} cases; "
        f"{seen['detected']} of {seen['planted']} planted slowdowns of {selftest.PLANTED - 1:.0%} found"
    )
    alarms, detection = seen["false_alarm_rate"], seen["detection_rate"]
    return int((alarms is not None and alarms > 0.01) or (detection is not None and detection < 0.95))
