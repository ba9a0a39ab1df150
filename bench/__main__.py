"""`python -m bench <suite>`: picks the suite and hands the arguments on."""

from __future__ import annotations

import argparse
import sys

from . import engine, ops

SUITES = {"engine": engine, "ops": ops}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of memory3.")
    suites = top.add_subparsers(dest="suite", required=True, metavar="suite")
    for name, suite in SUITES.items():
        about = suite.__doc__.strip().splitlines()[0]
        suite.add_arguments(
            suites.add_parser(
                name, help=about, description=suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
        )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return SUITES[args.suite].main(args)


if __name__ == "__main__":
    sys.exit(main())
