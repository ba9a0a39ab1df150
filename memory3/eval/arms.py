"""Ways to answer: what is read, by which weights, and what is done to the memories before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.llama import Llama

CHOICES = ("found", "random", "gold removed")
CODECS = {"VQ 10 B": "OPQ8_64,Residual2x8,PQ8x8", "VQ 34 B": "Residual2x8,PQ32x8"}  # bytes per vector; bf16 has 128


@dataclass(frozen=True)
class Arm:
    """One column of the results.

    reader   which weights read: "original", "adapted", or the name of a rival
    read     "none", "memory" or "text"; refs: references read at most
    choose   "found": what the retriever finds; "random": anything else; "gold removed": without the passage that holds
             the answer. noise: share of the references found that random ones replace
    memory   fields of MemoryConfig in place of the model's own: layers, tokens, rule
    codec    memories are encoded and decoded with this vector quantizer
    refit    "bias", "value" or "both": memories are refitted after the selection (memory3.eval.refit)
    limit    at most this many questions of each set, 0 for all: for controls that cost much or decide little
    """

    name: str
    reader: str = "original"
    read: str = "none"
    refs: int = 5
    choose: str = "found"
    noise: float = 0.0
    memory: Mapping[str, Any] = field(default_factory=dict, hash=False)
    codec: str | None = None
    refit: str = ""
    limit: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {
            "read": ("none", "memory", "text"), "choose": CHOICES, "refit": ("", "bias", "value", "both")
        }.items():  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"arm {self.name!r}, {name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.refs < 0 or not 0 <= self.noise <= 1:
            raise ValueError(f"arm {self.name!r}: expected refs >= 0 and noise 0..1, got {self.refs} and {self.noise}")


@dataclass(frozen=True)
class Reader:
    """Weights that read, with the memory configuration they were trained with, and those that write for them.

    writer   of a "frozen" adapter the checkpoint itself
    reads    what they were trained to read: "memory", "none" (a closed book) or "text"
    """

    net: Llama
    writer: Llama
    reads: str = "memory"


def main_arms(readers: Mapping[str, Reader], controls: int = 0) -> list[Arm]:
    """The main table: all arms of "original" and of weights that read memory, those of their kind of the others."""
    arms: list[Arm] = []
    for who, reader in readers.items():
        if who == "closed book":
            arms.append(Arm("trained closed book", who))
        elif reader.reads == "none":
            arms.append(Arm(f"{who}: no memory", who))
        elif reader.reads == "text":
            name = "trained reader" if who == "reader of text" else who
            arms += [Arm(f"{name}: RAG {n}", who, "text", refs=n, limit=controls) for n in (5, 1)]
        else:
            arms += _memory_arms(who, reader, controls)
    return arms


def _memory_arms(who: str, reader: Reader, controls: int) -> list[Arm]:
    every = {
        "layers": tuple(range(reader.net.config.n_layers)), "tokens": reader.net.memory.span, "rule": "causal",
        "head_map": None,
    }  # fmt: skip
    return [
        Arm(f"{who}: no memory", who),
        Arm(f"{who}: memory", who, "memory"),
        *(Arm(f"{who}: memory, {n}", who, "memory", codec=c, limit=controls) for n, c in CODECS.items()),
        Arm(f"{who}: RAG 5", who, "text", limit=controls),
        Arm(f"{who}: RAG 1", who, "text", refs=1, limit=controls),
        Arm(f"{who}: full KV", who, "memory", memory=every, limit=controls),
        Arm(f"{who}: random memories", who, "memory", choose="random", limit=controls),
        Arm(f"{who}: gold removed", who, "memory", choose="gold removed", limit=controls),
    ]


def ablations(n_layers: int, n_kv_heads: int, reader: str = "original") -> dict[str, list[Arm]]:
    """Tables of arms that need no training, each around the model as it is: 32 tokens per head in all layers."""
    every = tuple(range(n_layers))
    half, quarter = n_layers // 2, n_layers // 4
    bands = {
        "first half": range(half), "middle": range(quarter, n_layers - quarter), "last half": range(half, n_layers),
        "every other": range(0, n_layers, 2), "all": range(n_layers),
    }  # fmt: skip

    def arm(name: str, **options: Any) -> Arm:
        return Arm(name, reader, "memory", **options)

    return {
        "tokens per head, all layers": [arm(f"K={k}", memory={"tokens": k, "layers": every}) for k in (4, 8, 16, 32)],
        "layer band, 32 tokens per head": [arm(n, memory={"layers": tuple(band)}) for n, band in bands.items()],
        "KV heads that read, in every layer": [
            arm(name, memory={"layers": every, "head_map": (row,) * n_layers})
            for name, row in _head_rows(n_kv_heads).items()
        ],
        "memories read": [arm(f"{r} found", refs=r) for r in (1, 2, 3, 5, 8)],
        "share of memories replaced by random ones": [arm(f"{p:.0%}", noise=p) for p in (0.2, 0.4, 0.6, 0.8)],
        "selection rule, 8 tokens per head": [
            arm(rule, memory={"rule": rule, "tokens": 8}) for rule in ("causal", "received", "exp")
        ],
        "vector quantisation": [
            arm(f"{spec} ({_bits(spec)} bits)", codec=spec)
            for spec in ("OPQ8_64,Residual2x8,PQ8x8", "Residual2x8,PQ16x8", "Residual2x8,PQ32x8", "Residual2x8,PQ64x8")
        ],
        "refit after selection, 8 tokens per head": [
            arm(refit or "none", refit=refit, memory={"tokens": 8}) for refit in ("", "bias", "value", "both")
        ],
    }


def _head_rows(n_kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Rows of MemoryConfig.head_map, by the heads that read: each alone, and all but each (-1: reads no memory)."""
    every = tuple(range(n_kv_heads))
    some = [(head,) for head in every] + [tuple(h for h in every if h != head) for head in every]
    return {
        " ".join(map(str, heads)): tuple(heads.index(head) if head in heads else -1 for head in every)
        for heads in some if 0 < len(heads) < n_kv_heads
    }  # fmt: skip


def _bits(spec: str) -> int:
    from ..bank.codec import Spec

    return Spec.parse(spec, 64).code_bytes * 8
