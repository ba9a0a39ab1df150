"""What a training run is, as one frozen value, and the runs that have a name (docs/training.md)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..config import ModelConfig
from .schedule import SCHEDULES

STAGES = ("warmup", "continual", "sft")
WRITES = ("frozen", "live")
READS = ("memory", "text", "none")
EVALUATIONS = (*READS, "quantised", "random", "plain")
PLAIN_LOSSES = ("text", "base")
LORA_TARGETS = ("qkv", "out", "gate_up", "down")
# What may differ when a run is resumed: how long it is and what is reported, never what a step computes.
FREE = ("steps", "save_minutes", "eval_every", "eval_items", "eval_reads", "log_every", "keep", "micro_batch")


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates by peft: rank, alpha (the update is scaled by alpha / rank), names of the linear maps."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"lora.rank: expected at least 1, got {self.rank}")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"lora.targets: expected some of {', '.join(LORA_TARGETS)}, got {self.targets}")


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    model        a checkpoint as load_model takes it; or None, and `shape` is trained from random weights
    memory       fields of MemoryConfig that replace the model's own, such as {"tokens": 8, "layers": [10, 11]}
    stage        "warmup" plain text, "continual" text with a reference per chunk, "sft" questions and answers
    write        "frozen" memories of a bank, or "live" with gradient; read: "memory", "text" or "none"
    length       tokens of a sequence (warmup, continual)
    batch        sequences of one step over all processes; micro_batch: sequences of one forward pass
    drop_memory  share of sft questions that are asked without any reference; drop_gold: with others only; drop_found:
                 with references drawn at random
    quantised    share of the memories' readers that read them through the codebooks in the file `codec`
    plain        share of an sft batch's sequences that are plain text without memory; plain_loss: "text", every token
                 is predicted, or "base", the distributions of the weights without the adapter are kept
    own_refs     references that an sft question brings itself; the rest are borrowed from those of the `borrow`
                 questions around it
    lr           highest learning rate; schedule, warmup_steps, decay, floor: as schedule.rate takes them
    eval_items   held-out sequences or questions in an evaluation; eval_reads: what questions read there (default:
                 nothing, and what the run reads)
    precision    "bf16": autocast over fp32 weights (frozen weights are kept in bf16); "fp32"
    """

    name: str = ""
    model: str | None = None
    shape: ModelConfig | None = None
    memory: dict[str, Any] = field(default_factory=dict, hash=False)
    stage: str = "warmup"
    write: str = "live"
    read: str = "memory"
    length: int = 2048
    batch: int = 16
    micro_batch: int = 16
    steps: int = 1000
    lr: float = 3e-4
    schedule: str = "wsd"
    warmup_steps: int = 50
    decay: float = 0.1
    floor: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "bf16"
    checkpointing: bool = False
    lora: LoRA | None = None
    drop_memory: float = 0.1
    drop_gold: float = 0.1
    drop_found: float = 0.0
    quantised: float = 0.0
    codec: str | None = None
    plain: float = 0.0
    plain_loss: str = "text"
    own_refs: int = 5
    borrow: int = 16
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    eval_items: int = 64
    eval_reads: tuple[str, ...] = ()
    save_minutes: float = 5.0
    keep: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in self.memory.items()}  # as JSON gives them
        object.__setattr__(self, "memory", fields)
        object.__setattr__(self, "eval_reads", tuple(self.eval_reads))
        unknown = sorted(set(self.eval_reads) - set(EVALUATIONS))
        if unknown:
            raise ValueError(f"eval_reads: expected some of {', '.join(EVALUATIONS)}, got {unknown}")
        choices = {
            "stage": STAGES,
            "write": WRITES,
            "read": READS,
            "schedule": SCHEDULES,
            "precision": ("bf16", "fp32"),
            "plain_loss": PLAIN_LOSSES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if (self.model is None) == (self.shape is None):
            raise ValueError(
                "model, shape: expected exactly one of them, a checkpoint or a shape to start from scratch"
            )
        for name in (
            "length",
            "batch",
            "micro_batch",
            "steps",
            "log_every",
            "eval_every",
            "keep",
            "own_refs",
            "borrow",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("drop_memory", "drop_gold", "drop_found", "quantised", "plain"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share, 0 to 1, got {getattr(self, name)}")
        if (self.quantised or "quantised" in self.evaluated) and self.codec is None:
            raise ValueError("codec: expected a file of codebooks for quantised memories, got none")
        if self.plain_loss == "base" and self.plain and self.lora is None:
            raise ValueError('plain_loss: "base" needs the base weights beside the trained ones; train with lora')
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"lr, clip: expected positive numbers, got {self.lr} and {self.clip}")

    @property
    def evaluated(self) -> tuple[str, ...]:
        """What questions read in an evaluation."""
        return self.eval_reads or tuple(dict.fromkeys(("none", self.read)))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of to_json. Raises ValueError naming an unknown field."""
        raw = json.loads(text)
        unknown = sorted(raw.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"training configuration: unknown fields {unknown}")
        if raw.get("shape") is not None:
            raw["shape"] = ModelConfig(**raw["shape"])
        if raw.get("lora") is not None:
            raw["lora"] = LoRA(**raw["lora"])
        return cls(**raw)

    def changes(self, other: TrainConfig) -> list[str]:
        """Fields in which a resumed run must not differ and does."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        return [name for name in mine if name not in FREE and mine[name] != theirs[name]]
