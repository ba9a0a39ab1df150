"""What the demo shows: progress while it works, then answers side by side and the table."""

from __future__ import annotations

from contextlib import contextmanager

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..cli.common import human_bytes
from ..cli.show import clip
from .run import MODES, TITLES


class Screen:
    """Prints to a console; everything also works without a terminal."""

    def __init__(self, console: Console, answers: int = 4) -> None:
        self.console, self._answers = console, answers

    @contextmanager
    def status(self, text: str):
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.console.print(text)
            yield

    @contextmanager
    def asking(self, total: int):
        columns = (TextColumn("asking, three ways"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.advance(task)

    def bank_ready(self, count: int, built) -> None:
        how = f"{built.written} written in {built.seconds:.0f} s" if built.written else "from an earlier run, reused"
        self.console.print(f"bank of {count} references ({how})")

    def show(self, report: dict) -> None:
        for entry in chosen(report["answers"], self._answers):
            self.console.print(self._side_by_side(entry))
        self.console.print(self._table(report))
        self.console.print(self._verdict(report), soft_wrap=True)

    def _side_by_side(self, entry: dict) -> Panel:
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("[bold]in the bank[/bold]", f"[bold]{entry['stem']} … {entry['answer']}[/bold]")
        for mode in MODES:
            hit = "[green]hit[/green]" if entry["hit"][mode] else "miss"
            table.add_row(TITLES[mode], "… " + clip(entry[mode], 160), f"{hit}, loss {entry['loss'][mode]:.2f}")
        for read in entry["read"]:
            mark = "*" if read["id"] == entry["gold"] else " "
            mass = "" if read["mass"] is None else f"mass {read['mass']:.1%}"
            table.add_row(f"[dim]read{mark}[/dim]", f"[dim]{clip(read['text'], 110)}[/dim]", f"[dim]{mass}[/dim]")
        return Panel(table, title=entry["question"], title_align="left")

    def _table(self, report: dict) -> Table:
        title = f"{report['questions']} questions, {report['references']} references, seed {report['seed']}"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for row in report["rows"]:
            table.add_column(TITLES[row["mode"]], justify="right")
        lines = (
            ("answers that hit", lambda r: f"{r['hits']:.0%}"),
            ("answer loss, nats per token", lambda r: f"{r['loss']:.2f}"),
            ("  short facts", lambda r: f"{r['loss_fact']:.2f}"),
            ("  sentences", lambda r: f"{r['loss_sentence']:.2f}"),
            ("gold reference retrieved", lambda r: "" if r["found"] is None else f"{r['found']:.0%}"),
            ("time to first token", lambda r: f"{r['ttft_s'] * 1000:.0f} ms"),
            ("tokens/s, batch 1", lambda r: f"{r['tokens_per_s']:.1f}"),
            ("key-values held per sequence", lambda r: human_bytes(r["kv_bytes"])),
            ("bytes loaded per 64-token chunk", lambda r: human_bytes(r["bytes_per_chunk"])),
        )
        for name, cell in lines:
            table.add_row(name, *(cell(row) for row in report["rows"]))
        return table

    @staticmethod
    def _verdict(report: dict) -> str:
        none, memory, rag = (next(r for r in report["rows"] if r["mode"] == m) for m in MODES)
        share = (none["loss"] - memory["loss"]) / max(1e-9, none["loss"] - rag["loss"])
        what = "This model was never trained to read memories"
        if report.get("adapter"):
            what = "An adapter taught this model to read memories (the titles asked about were not in its training)"
        return (
            f"{what}. Reading them moves its answer loss from {none['loss']:.2f} to {memory['loss']:.2f} nats per "
            f"token, {share:.0%} of the way to text in the prompt ({rag['loss']:.2f}); correct answers: "
            f"{memory['hits']:.0%} with memory, {rag['hits']:.0%} with text, {none['hits']:.0%} with neither."
        )


def chosen(entries: list[dict], count: int) -> list[dict]:
    """Entries to show, in the order they were asked: half of them answered by memory and not without, half others."""
    helped = [e for e in entries if e["hit"]["memory"] and not e["hit"]["none"]][: (count + 1) // 2]
    others = [e for e in entries if e not in helped][: count - len(helped)]
    return [e for e in entries if e in helped or e in others]
