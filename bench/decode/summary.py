"""What the runs say: medians with 95 % intervals, ratios taken round by round, predictions beside them, gates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from memory3.config import PRESETS, MemoryConfig, ModelConfig
from memory3.theory import Cost, break_even

from ..ceilings import Ceilings
from ..corpus import MODEL
from ..timing import Summary, median_interval, quantile, ratios
from .arms import LOADING, Setting
from .predict import Machine, explain
from .record import Record


@dataclass(frozen=True)
class Gate:
    """A ratio of throughputs that the project promises (`must`) or expects and explains."""

    what: str
    arm: str
    other: str
    least: float
    must: bool
    protocol: str = "warm"
    batch: int | None = None


GATES = (
    Gate("memory against no memory, warm", "memory", "none", 0.95, True),
    Gate("memory (VQ) against no memory, warm", "memory-vq", "none", 0.95, True),
    Gate("memory against no memory, worst case", "memory", "none", 0.90, True, "worst"),
    Gate("memory (VQ) against no memory, worst case", "memory-vq", "none", 0.90, True, "worst"),
    Gate("memory against RAG every 64 tokens", "memory", "rag-append", 2.0, False, batch=8),
    Gate("memory against RAG once", "memory", "rag", 1.4, False, batch=8),
    Gate("memory against llama.cpp with references", "memory", "llama.cpp-rag", 2.0, False, batch=1),
    Gate("plain loop against llama.cpp", "none", "llama.cpp", 1.0, False, batch=1),
)


def rows(record: Record, config: ModelConfig | None = None, memory: MemoryConfig | None = None) -> list[dict[str, Any]]:
    """One per setting and arm, from complete rounds. config, memory: of the model measured (default: the preset's, with
    the memory format that the record tells)."""
    config, memory = config or PRESETS[MODEL].model, memory or _format(record)
    found = []
    for setting in record.known():
        runs = record.of(setting)
        if any(not one for one in runs.values()):
            continue
        predicted = _predictions(record, setting, runs, config, memory)
        for arm in runs:
            found.append(_row(record, setting, arm, runs, predicted, memory.chunk))
    return found


def _format(record: Record) -> MemoryConfig:
    """Costs ask how many layers have memories, not which."""
    memory, about = PRESETS[MODEL].memory, record.about
    layers = tuple(range(about.get("memory_layers", len(memory.layers))))
    return replace(memory, tokens=about.get("memory_tokens", memory.tokens), layers=layers)


def _row(record: Record, setting: Setting, arm: str, runs: dict, predicted: dict, chunk: int) -> dict[str, Any]:
    mine = runs[arm]
    walls, firsts = [r["wall_s"] for r in mine], sorted(r["ttft_s"] for r in mine)
    speeds = [r["new_tokens"] / r["wall_s"] for r in mine]

    def median(name: str) -> float:
        return Summary.of(r[name] for r in mine).median

    stages = sorted({stage for r in mine for stage in r["times"]})
    beside = {}
    for other, theirs in runs.items():
        if other != arm:
            each = ratios([r["wall_s"] for r in theirs], walls)
            beside[other] = [Summary.of(each).median, *median_interval(each)]
    guess = predicted.get(arm)
    return {
        "setting": setting.key,
        **{name: getattr(setting, name) for name in Setting.__dataclass_fields__},
        "arm": arm,
        "runs": len(mine),
        "tokens_per_s": Summary.of(speeds).median,
        "tokens_per_s_interval": list(median_interval(speeds)),
        "wall_s": Summary.of(walls).median,
        "wall_s_interval": list(median_interval(walls)),
        "cpu_s": median("cpu_s"),
        "ttft_s_p50": quantile(firsts, 0.5),
        "ttft_s_p90": quantile(firsts, 0.9),
        "peak_rss_bytes": record.peak.get(setting.key, {}).get(arm),
        "kv_bytes": median("kv_bytes"),
        "retrievals": median("retrievals"),
        "bytes_loaded": median("bytes_loaded"),
        "bytes_per_chunk": median("bytes_loaded") / (setting.batch * 2 * setting.tokens / chunk),
        "device_bytes": median("device_bytes"),
        "stages": {name: Summary.of(r["times"].get(name, 0.0) for r in mine).median for name in stages},
        "ratios": beside,  # of throughputs, this arm to the other: median, low, high
        "predicted_seconds": guess and {k: v for k, v in guess.items() if k != "ratio"},
        "predicted_ratios": {
            other: guess["ratio"] / predicted[other]["ratio"]
            for other in runs
            if other != arm and guess and predicted.get(other)
        },
        "load_average": median("load"),
        "others": max(r.get("others", 0.0) for r in mine),
    }


def _predictions(record: Record, setting: Setting, runs: dict, config, memory) -> dict[str, dict | None]:
    about = record.about.get(f"{setting.weights}, {setting.threads} threads")
    if about is None or "none" not in runs:
        return {}
    machine = Machine(Ceilings(**about["ceilings"]), about["device_gb_s"])

    def middle(arm: str, value) -> float:
        return Summary.of(value(r) for r in runs[arm]).median

    plain = {stage: middle("none", lambda r, s=stage: r["times"].get(s, 0.0)) for stage in ("prefill", "decode")}
    plain["total"] = middle("none", lambda r: r["wall_s"])
    shape = {"batch": setting.batch, "refs": setting.refs, "tokens": setting.tokens}
    return {
        arm: explain(
            arm, shape, config, memory, about["weight_bytes"], machine, plain, middle(arm, lambda r: r["bytes_loaded"]),
            setting.protocol == "worst" and arm in LOADING,
        )
        for arm in runs
    }  # fmt: skip


def gates(rows: list[dict]) -> list[dict[str, Any]]:
    """Every gate in every setting it speaks of: median ratio, interval, prediction, whether it is met."""
    found = []
    for gate in GATES:
        for row in rows:
            here = gate.protocol == row["protocol"] and gate.batch in (None, row["batch"]) and row["arm"] == gate.arm
            if here and gate.other in row["ratios"]:
                ratio, low, high = row["ratios"][gate.other]
                found.append(
                    {
                        "what": gate.what, "setting": row["setting"], "must": gate.must, "least": gate.least,
                        "ratio": ratio, "low": low, "high": high, "met": ratio >= gate.least,
                        "predicted": row["predicted_ratios"].get(gate.other),
                    }
                )  # fmt: skip
    return found


def break_evens(rows: list[dict], about: dict[str, dict]) -> list[dict[str, Any]]:
    """Seconds of writing and of one use of one reference, and from how many uses a memory pays against each RAG.

    A use: one reference for one query. It costs what its arm takes longer than the plain loop, by the uses made;
    negative differences (noise) count as free.
    """
    found = []
    by = {(r["setting"], r["arm"]): r for r in rows}
    for row in rows:
        plain, written = by.get((row["setting"], "none")), about.get(f"{row['weights']}, {row['threads']} threads")
        if row["arm"] not in LOADING or plain is None or not written or not row["retrievals"]:
            continue
        write = written["write_s"][row["arm"]]
        read = _per_use(row, plain)
        for name in ("rag", "rag-append", "rag-front"):
            rag = by.get((row["setting"], name))
            if rag is not None:
                text = _per_use(rag, plain)
                uses = break_even(Cost(write, read), Cost(0.0, text))
                found.append(
                    {
                        "setting": row["setting"], "arm": row["arm"], "against": name, "write_s": write,
                        "read_s": read, "text_s": text, "uses": uses,
                    }
                )  # fmt: skip
    return found


def _per_use(row: dict, plain: dict) -> float:
    return max(0.0, row["wall_s"] - plain["wall_s"]) / (row["retrievals"] * row["refs"])
