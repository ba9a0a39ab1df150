"""`python -m bench <command>`: picks the command and hands the arguments on."""

from __future__ import annotations

import argparse
import sys

from . import compare, decode, dispatch, engine, gpu, growth, loop, reporting, run

COMMANDS = {"run": run, "dispatch": dispatch, "loop": loop, "engine": engine, "decode": decode, "compare": compare}
COMMANDS |= {"growth": growth, "report": reporting}
COMMANDS |= gpu.COMMANDS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of memory3.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        about = module.__doc__.strip().splitlines()[0]
        module.add_arguments(
            commands.add_parser(
                name, help=about, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
        )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return COMMANDS[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
