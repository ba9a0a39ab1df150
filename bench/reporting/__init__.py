"""Results as Markdown, PNG plots and one HTML page that needs no other file.

    python -m bench report bench/results/*.json --out DIR

Every suite's JSON is understood; what is plotted: rooflines and peers of `run`, speeds of `decode`, curves of `growth`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..report import SCHEMA
from . import page, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="JSON files that the other commands wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bench-report"), help="default: bench-report")
    parser.add_argument("--title", default="memory3 benchmarks")


def main(args: argparse.Namespace) -> int:
    from . import plots  # matplotlib is a dependency of this command alone

    documents = [(path.stem, read(path)) for path in args.files]
    args.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, document in documents:
        drawn = []
        for plot, figure in plots.of(document):
            file = args.out / f"{name}-{plot}.png"
            plots.save(figure, file)
            drawn.append(file)
        sections.append(tables.section(name, document, drawn))
    (args.out / "report.md").write_text(page.markdown(args.title, sections), encoding="utf-8")
    (args.out / "report.html").write_text(page.html(args.title, sections), encoding="utf-8")
    print(f"{args.out / 'report.html'}: {len(sections)} results, {sum(len(s.plots) for s in sections)} plots")
    return 0


def read(path: Path) -> dict[str, Any]:
    """Raises SystemExit for a file that no suite wrote. Earlier schemas are shown as far as they go."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["suite"], document["rows"], document["environment"]  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: expected a JSON file that a bench command wrote ({error!r})") from error
    if document["schema"] > SCHEMA:
        raise SystemExit(f"{path}: schema {document['schema']} is newer than this program's {SCHEMA}")
    return document
