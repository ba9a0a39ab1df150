"""memory3 doctor"""

from __future__ import annotations

import typer

from .common import JsonOption, out, print_json

EXAMPLES = """
[bold]Examples[/bold]\n
memory3 doctor\n
memory3 doctor --json | python -m json.tool
"""


def run(as_json: JsonOption = False) -> None:
    """Say what is installed and loaded, and why not: kernels, model, embedder, texts. Exit code 1 if anything lacks."""
    from memory3_kernels import doctor as kernels

    from .. import __version__, data

    report = kernels.examine()
    missing = data.missing()
    report["memory3"] = __version__
    report["demo_packages_missing"] = missing
    if as_json:
        print_json(report)
    else:
        out.print(kernels.render(report), markup=False)
        if missing:
            out.print("demo packages missing; install them with\n  " + data.install_command(), markup=False)
        else:
            out.print("demo packages: all installed", markup=False)
    if report["native"]["reason"] or missing:
        raise typer.Exit(1)
