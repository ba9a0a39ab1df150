"""Tables for people: what was read, and where the time went."""

from __future__ import annotations

from rich.table import Table

from .common import human_bytes, out


def clip(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def show_reads(reads, bank) -> None:
    """One row per reference a chunk read."""
    table = Table("chunk", "tokens", "similarity", "mass", "reference", title="memories read", title_justify="left")
    for read in reads:
        for i, record in enumerate(read.ids):
            table.add_row(
                read.where if i == 0 else "",
                f"{read.start}-{read.end}" if i == 0 else "",
                f"{read.scores[i]:.3f}",
                f"{read.mass[i]:.1%}" if read.mass else "",
                clip(bank.text(record)),
                end_section=i == len(read.ids) - 1,
            )
    out.print(table)


def show_stats(stats) -> None:
    """Throughput, memory, and seconds by stage."""
    table = Table("what", "value", title="run", title_justify="left", show_header=False)
    table.add_row("time to first token", f"{stats.ttft_s * 1000:.0f} ms")
    table.add_row("new tokens", f"{stats.new_tokens} ({stats.tokens_per_s:.1f}/s, prefill included)")
    table.add_row("retrievals", str(stats.retrievals))
    table.add_row("key-values held", human_bytes(stats.kv_bytes) + " per sequence")
    table.add_row("record bytes loaded", human_bytes(stats.bytes_loaded))
    for stage, seconds in sorted(stats.times.items(), key=lambda item: -item[1]):
        share = seconds / stats.total_s if stats.total_s else 0
        table.add_row(f"  {stage}", f"{seconds * 1000:.0f} ms ({share:.0%})")
    out.print(table)


def show_profile(stats) -> None:
    """Seconds by what was computed, each counted once, as a bar chart."""
    whole = sum(stats.profile.values()) or 1.0
    table = Table("stage", "ms", "share", "", title="profile", title_justify="left")
    for stage, seconds in sorted(stats.profile.items(), key=lambda item: -item[1]):
        share = seconds / whole
        table.add_row(stage, f"{seconds * 1000:.1f}", f"{share:.1%}", "█" * round(40 * share))
    out.print(table)
