"""A tiny run as a program of its own, to be killed, or started twice by torchrun: run_tiny.py OUT STEPS."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from memory3.train.batch import Piece, Sample
from memory3.train.config import TrainConfig
from memory3.train.objective import Objective
from memory3.train.parallel import World
from memory3.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from model.common import TINY, TINY_MEMORY, tiny  # noqa: E402


def tokens_of(record: bytes) -> list[int]:
    """A reference: a key token, then its value, then noise."""
    rng = random.Random(record)
    return [record[0], 40 + record[1], *(rng.randrange(80, 97) for _ in range(6))]


class Pairs:
    """Key -> value, asked after noise; the value stands in the reference alone. Keys and values are new every step."""

    def __init__(self, batch: int = 8, memory: bool = True) -> None:
        self.batch, self.memory = batch, memory

    def samples(self, step: int) -> list[Sample]:
        rng = random.Random(step)
        return [self._one(rng) for _ in range(self.batch)]

    def _one(self, rng: random.Random) -> Sample:
        key, value = rng.randrange(2, 34), rng.randrange(8)
        ids = (1, rng.randrange(80, 97), key, 40 + value)
        return Sample(ids, 3, (Piece(4, (bytes([key, value]),)),) if self.memory else ())


def config(**changes) -> TrainConfig:
    options = {
        "shape": TINY, "stage": "sft", "batch": 8, "micro_batch": 4, "steps": 12, "lr": 3e-3, "warmup_steps": 2,
        "precision": "fp32", "log_every": 1, "eval_every": 4, "save_minutes": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**options, **changes})


def trainer(out: Path, source=None, world=None, evaluate=None, **changes) -> Trainer:
    net = tiny(memory=TINY_MEMORY).init_weights(0).requires_grad_(True)
    return Trainer(config(**changes), Objective(net, tokens_of), source or Pairs(), out, world=world, evaluate=evaluate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.join("cpu")
    run = trainer(Path(sys.argv[1]), world=world, steps=int(sys.argv[2]))
    run.run()
    run.close()
    world.leave()
