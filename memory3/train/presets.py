"""Runs by name and stage: what `memory3 train --config NAME --stage STAGE` starts from (docs/training.md)."""

from __future__ import annotations

from types import MappingProxyType

from ..config import PRESETS as MODELS
from ..config import ModelConfig
from .config import LoRA, TrainConfig

# From scratch on one CPU core in minutes: 5.3 M weights in the blocks, a byte-level vocabulary of 4,096.
TINY = ModelConfig(
    vocab_size=4096, dim=256, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=512, max_context=1024
)
TINY_MEMORY = {"layers": tuple(range(4)), "tokens": 8, "rule": "received"}

# Memory3, sections 4.3 and 5: batches of 4 M tokens, length 2,048; 3.1 T tokens of warmup, 120 G of continual training.
# The highest learning rate is only in the paper's figures; 3e-4 is usual at this size.
_PAPER = TrainConfig(
    name="paper-2.4b", shape=MODELS["paper-2.4b"].model, memory={"layers": tuple(range(22)), "tokens": 8}, length=2048,
    batch=2048, micro_batch=4, steps=740_000, warmup_steps=2000, lr=3e-4, checkpointing=True, eval_every=2000,
    save_minutes=30.0,
)  # fmt: skip

# 8 tokens per head in half the layers, a band where the unadapted checkpoint reads well; the adapter of the demo (sft)
# reads what the checkpoint's own banks hold.
SMOL_MEMORY = {"layers": tuple(range(30)), "tokens": 32, "rule": "causal"}
_SMOL = TrainConfig(
    name="smollm2-135m", model="smollm2-135m", memory={"layers": tuple(range(12, 27)), "tokens": 8}, length=512,
    batch=8, micro_batch=4, steps=2000, lr=5e-4, warmup_steps=50, weight_decay=0.01, lora=LoRA(rank=16, alpha=32.0),
)  # fmt: skip


def _stages(base: TrainConfig, **changes: dict) -> dict[str, TrainConfig]:
    from dataclasses import replace

    return {stage: replace(base, stage=stage, **options) for stage, options in changes.items()}


_TINY = TrainConfig(
    name="tiny", shape=TINY, memory=TINY_MEMORY, length=256, batch=16, micro_batch=16, steps=400, lr=2e-3,
    warmup_steps=20, eval_every=100, save_minutes=2.0,
)  # fmt: skip

RUNS = MappingProxyType(
    {
        "paper-2.4b": _stages(
            _PAPER,
            warmup={},
            continual={"steps": 28_600, "lr": 1e-4},
            sft={"lr": 5e-5, "schedule": "cosine", "batch": 512, "steps": 7_500, "warmup_steps": 750},
        ),
        "tiny": _stages(_TINY, warmup={}, continual={"lr": 1e-3, "steps": 200}, sft={"lr": 1e-3, "steps": 400}),
        "smollm2-135m": _stages(
            _SMOL,
            warmup={},
            continual={"write": "live"},
            sft={"write": "frozen", "batch": 16, "micro_batch": 16, "warmup_steps": 20, "memory": SMOL_MEMORY},
        ),
    }
)


def run_config(name: str, stage: str) -> TrainConfig:
    """The named run's configuration for a stage. Raises ValueError with the names there are."""
    if name not in RUNS:
        raise ValueError(f"config: expected one of {', '.join(RUNS)}, got {name!r}")
    if stage not in RUNS[name]:
        raise ValueError(f"stage: expected one of {', '.join(RUNS[name])}, got {stage!r}")
    return RUNS[name][stage]
