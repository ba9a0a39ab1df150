"""What an arm should cost beside the plain loop, from operations and bytes alone.

A run is a list of passes of the model, each with so many new tokens per sequence behind so many others. A pass takes
the longer of its operations at the machine's products and its bytes at the machine's reads. How far prefill and
decoding stay from these ceilings is taken from the plain loop, measured in the same rounds, and assumed for every arm
alike; loads and embeddings come on top. So a prediction says what follows from the format, and the difference to the
measured ratio is what the implementation adds, or the model leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memory3.config import MemoryConfig, ModelConfig

from ..ceilings import Ceilings

# Per token of a query: the encoder's weights but its vocabulary, a product and a sum each, of bytes, which are
# multiplied twice as fast as the pairs of bf16 that the ceiling is of.
EMBED_OPERATIONS = 2 * 10.6e6 / 2
LOAD_PASSES = 3  # a record is read for its checksum, read again and written into its slot


@dataclass(frozen=True)
class Pass:
    """`new` tokens of each sequence behind `past` tokens; every one also reads `memory` memory tokens (all layers)."""

    new: int
    past: int
    memory: float = 0.0


@dataclass(frozen=True)
class Run:
    passes: tuple[Pass, ...]
    batch: int
    query_tokens: int = 0  # embedded
    load_bytes: float = 0.0  # of records, into slots
    device: bool = False  # from the device, else from RAM


@dataclass(frozen=True)
class Machine:
    ceilings: Ceilings
    device_gb_s: float


def pass_seconds(one: Pass, batch: int, model: ModelConfig, weight_bytes: int, top: Ceilings) -> float:
    """Seconds at the ceilings."""
    linear = 2 * (model.non_embedding_parameters + model.vocab_size * model.dim / one.new)  # the head: last token only
    seen = one.past + (one.new + 1) / 2 + one.memory  # keys per query
    width = model.n_heads * model.head_dim
    operations = batch * one.new * (linear + 4 * model.n_layers * width * seen)
    row = 2 * 2 * model.n_layers * model.n_kv_heads * model.head_dim
    moved = weight_bytes + batch * row * (one.past + one.new + one.memory)
    return max(operations / top.dot_gflop_s, moved / top.read_gb_s) / 1e9


def run_seconds(
    run: Run, model: ModelConfig, weight_bytes: int, machine: Machine, prefill: float = 1.0, decode: float = 1.0
) -> dict[str, float]:
    """Seconds by stage; prefill, decode: how many times as long as at the ceilings such passes take."""
    top, found = machine.ceilings, {"prefill": 0.0, "decode": 0.0}
    for one in run.passes:
        kind = "prefill" if one.new > 1 else "decode"
        found[kind] += pass_seconds(one, run.batch, model, weight_bytes, top)
    found = {"prefill": prefill * found["prefill"], "decode": decode * found["decode"]}
    found["embed"] = prefill * run.batch * run.query_tokens * EMBED_OPERATIONS / top.dot_gflop_s / 1e9
    rate = machine.device_gb_s if run.device else top.read_gb_s / LOAD_PASSES
    found["load"] = run.load_bytes / rate / 1e9
    return found


def passes(first: int, tokens: int, memory: float = 0.0, past: int = 0) -> list[Pass]:
    """A prompt of `first` tokens, then tokens - 1 passes of one token."""
    steps = (Pass(1, past + first + i, memory) for i in range(tokens - 1))
    return [Pass(first, past, memory), *steps]


def run_of(
    arm: str, model: ModelConfig, memory: MemoryConfig, *, batch: int, refs: int, tokens: int, load_bytes: float = 0.0,
    device: bool = False,
) -> Run | None:  # fmt: skip
    """The passes of an arm at `tokens` in and out; None for an arm of another program."""
    chunk, opening = memory.chunk, len(memory.context_bos_ids)
    start = tokens + opening
    front = refs * (memory.span + memory.prefix_len)
    changes = (tokens - 1) // chunk  # retrievals while generating
    if arm == "none":
        return Run(tuple(passes(start, tokens)), batch)
    if arm in ("memory", "memory-vq"):
        kept = refs * memory.tokens * len(memory.layers) / model.n_layers
        kept *= memory.record_heads(model.n_kv_heads) / model.n_kv_heads
        asked = -(-tokens // chunk) + changes
        steps = passes(start, tokens, kept, memory.prefix_len)
        return Run(tuple(steps), batch, asked * chunk, load_bytes, device)
    if arm == "full-kv":
        steps = passes(start, tokens, refs * memory.span, memory.prefix_len)
        return Run(tuple(steps), batch, tokens, load_bytes, device)
    if arm == "rag":
        return Run(tuple(passes(front + start, tokens)), batch, chunk)
    if arm in ("rag-append", "rag-front"):
        return Run(tuple(_again(front, start, tokens, chunk, arm == "rag-append")), batch, chunk * (1 + changes))
    return None


def _again(front: int, start: int, tokens: int, chunk: int, append: bool) -> Iterable[Pass]:
    yield Pass(front + start, 0)
    past = front + start
    for i in range(1, tokens):
        if i % chunk:
            yield Pass(1, past)
            past += 1
        elif append:
            yield Pass(front + 1, past)
            past += front + 1
        else:
            yield Pass(front + start + i, 0)
            past = front + start + i


def explain(
    arm: str, shape: dict[str, int], model: ModelConfig, memory: MemoryConfig, weight_bytes: int, machine: Machine,
    plain: dict[str, float], load_bytes: float = 0.0, device: bool = False,
) -> dict[str, float] | None:  # fmt: skip
    """Predicted throughput relative to the plain loop ("ratio") and predicted seconds by stage.

    shape: batch, refs, tokens. plain: measured seconds of the plain loop, "total", "prefill" and "decode".
    load_bytes: of the records it had to read, as counted; device: they are not in RAM.
    """
    run = run_of(arm, model, memory, load_bytes=load_bytes, device=device, **shape)
    if run is None:
        return None
    ideal = run_seconds(run_of("none", model, memory, **shape), model, weight_bytes, machine)
    slower = {stage: plain[stage] / ideal[stage] for stage in ("prefill", "decode")}
    seconds = run_seconds(run, model, weight_bytes, machine, **slower)
    rest = plain["total"] - plain["prefill"] - plain["decode"]
    return {"ratio": plain["total"] / (sum(seconds.values()) + rest), **seconds}
