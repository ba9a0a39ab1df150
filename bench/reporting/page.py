"""Sections as a Markdown file (plots beside it) and as one HTML page with everything inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from .tables import Section, Table

STYLE = """
:root { color-scheme: light dark; --line: #d5dae0; --soft: #f4f6f8; --ink: #1c2329; --back: #ffffff; --mark: #1f5f8b; }
@media (prefers-color-scheme: dark) { :root { --line: #39424c; --soft: #20262d; --ink: #e4e8ec; --back: #14181d; --mark: #7db7de; } }
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back) }
header, nav, main { max-width: 1240px; margin: 0 auto; padding: 0 24px }
h1 { margin: 28px 0 4px; font-size: 26px } h2 { margin: 44px 0 4px; font-size: 20px; border-top: 2px solid var(--mark); padding-top: 12px }
h3 { margin: 26px 0 8px; font-size: 15px } p.about { margin: 0 0 12px; opacity: .75; font-size: 13px }
nav a { margin-right: 16px; color: var(--mark); text-decoration: none }
div.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { background: var(--soft); position: sticky; top: 0 }
tr:last-child td { border-bottom: 0 } tbody tr:hover { background: var(--soft) }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: 8px 0 } details summary { cursor: pointer; color: var(--mark) }
"""  # noqa: E501
LONG = 24  # rows above which a table is folded


def markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.about, ""]
        lines += [line for plot in section.plots for line in (f"![{plot.stem}]({plot.name})", "")]
        for table in section.tables:
            lines += [
                f"### {table.title}",
                "",
                _row(table.columns),
                _row(["---", *["---:"] * (len(table.columns) - 1)]),
            ]
            lines += [*(_row(row) for row in table.rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(title: str, sections: Sequence[Section]) -> str:
    """No script, no link to anything outside; plots are inside as PNG."""
    menu = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "".join(_section(i, s) for i, s in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1></header><nav>{menu}</nav><main>{body}</main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    images = "".join(
        f'<img alt="{escape(plot.stem)}" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">'
        for plot in section.plots
    )
    tables = "".join(map(_table, section.tables))
    return (
        f'<h2 id="s{number}">{escape(section.title)}</h2><p class="about">{escape(section.about)}</p>{images}{tables}\n'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    whole = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if len(table.rows) > LONG:
        whole = f"<details><summary>{len(table.rows)} rows</summary>{whole}</details>"
    return f"<h3>{escape(table.title)}</h3>{whole}"
