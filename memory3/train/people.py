"""A controlled study, from scratch in minutes: invented people with attributes, told in one wording, asked in another.

    python -m memory3.train.people --out runs/people [--steps 1500]

Four runs of one small model see the same number of steps: closed book, memory from the first step, memory after a third
of the steps without it (Memory3, arXiv 2407.01178, figure 11: only such a warmup is said to make memory help), and the
references as text. The people they are evaluated on are in no training text: what is known about them stands in their
references alone. A second evaluation asks closed book about people of the training text, whose facts fit into the
weights: does knowledge leave the weights when it can be read?
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import MemoryConfig, ModelConfig
from ..model.llama import Llama
from .batch import Piece, Sample
from .config import TrainConfig
from .metrics import read_metrics
from .objective import Objective
from .prepare import mean_loss
from .progress import Progress
from .trainer import Trainer

PREFIX, BOS, END = 1, 2, 3
FIELDS, VALUES, SYLLABLES = 4, 40, 60
ASKED = 8  # words that ask for a field; the four after them tell it in a reference
FIRST_VALUE = 16
FIRST_NAME = FIRST_VALUE + FIELDS * VALUES
FILLERS = FIRST_NAME + 2 * SYLLABLES
VOCABULARY = FILLERS + 20
TRAIN, HELD = 400, 100
REFS, TOLD = 5, 6  # references per sequence; statements in it

SHAPE = ModelConfig(
    vocab_size=VOCABULARY, dim=128, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, max_context=512
)
MEMORY = MemoryConfig(layers=(0, 1, 2), tokens=8, span=32, refs=REFS, prefix_ids=(PREFIX,), context_bos_ids=(BOS,))
ARMS = {  # what is read, and after which share of the steps
    "closed book": ("none", 0.0),
    "memory from scratch": ("memory", 0.0),
    "memory after 1/3": ("memory", 1 / 3),
    "text": ("text", 0.0),
}


class People:
    """Names of two tokens, one value for each of four fields, and a reference per person."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"{seed} people")
        pairs = [(a, b) for a in range(SYLLABLES) for b in range(SYLLABLES)]
        chosen = rng.sample(pairs, TRAIN + HELD)
        self.names = [(FIRST_NAME + a, FIRST_NAME + SYLLABLES + b) for a, b in chosen]
        self.values = [[FIRST_VALUE + f * VALUES + rng.randrange(VALUES) for f in range(FIELDS)] for _ in chosen]
        self.references = [self._reference(i, rng) for i in range(len(chosen))]

    def _reference(self, person: int, rng: random.Random) -> list[int]:
        """Name, then the fields in any order with fillers between: 19 to 26 tokens."""
        out = list(self.names[person])
        for f in rng.sample(range(FIELDS), FIELDS):
            out += [FILLERS + rng.randrange(20) for _ in range(rng.randint(1, 2))]
            out += [ASKED + FIELDS + f, self.values[person][f], END]
        return out

    def tokens(self, record: bytes) -> list[int]:
        """Of a reference, by the person's number as bytes."""
        return self.references[int.from_bytes(record, "big")]

    def question(self, person: int, f: int) -> list[int]:
        return [ASKED + f, *self.names[person]]

    def sample(self, ids: Sequence[int], first: int, read: str, people: Sequence[int]) -> Sample:
        """A sequence that reads these people's references as memories, as text in front, or not at all."""
        records = tuple(p.to_bytes(2, "big") for p in people)
        front = [t for r in records for t in (PREFIX, *self.tokens(r))] if read == "text" else []
        ids = (*front, BOS, *ids)
        pieces = (Piece(len(ids), records),) if read == "memory" else ()
        return Sample(ids, first + 1 + len(front), pieces)


class Statements:
    """Training sequences: six statements about two people, read from step `begin` on."""

    def __init__(self, people: People, read: str, begin: int, batch: int, seed: int) -> None:
        self.people, self.read, self.begin, self.batch, self.seed = people, read, begin, batch, seed

    def samples(self, step: int) -> list[Sample]:
        rng = random.Random(f"{self.seed} {step}")
        read = self.read if step >= self.begin else "none"
        return [self._one(read, rng) for _ in range(self.batch)]

    def _one(self, read: str, rng: random.Random) -> Sample:
        among = rng.sample(range(TRAIN), REFS)
        asked = [(p, f) for p in among[:2] for f in range(FIELDS)]
        ids: list[int] = []
        for p, f in rng.sample(asked, TOLD):
            ids += [*self.people.question(p, f), self.people.values[p][f], END]
        rng.shuffle(among)
        return self.people.sample(ids, 0, read, among)


def questions(people: People, whom: range, read: str, seed: int = 0) -> list[Sample]:
    """One question per person and field, the value predicted; the person's reference is one of those read."""
    rng = random.Random(f"{seed} questions {whom}")
    out = []
    for p in whom:
        for f in range(FIELDS):
            among = [p, *rng.sample([q for q in whom if q != p], REFS - 1)]
            rng.shuffle(among)
            question = people.question(p, f)
            out.append(people.sample([*question, people.values[p][f]], len(question), read, among))
    return out


def study(out: Path, steps: int, batch: int = 16, seed: int = 0, progress: bool = True) -> dict[str, list[dict]]:
    """Run all arms in OUT (each goes on where it stopped); returns their evaluations by step, and draws them."""
    people = People(seed)
    held, known = range(TRAIN, TRAIN + HELD), range(100)
    found = {}
    for arm, (read, share) in ARMS.items():
        begin = round(share * steps)
        config = TrainConfig(
            name=arm, shape=SHAPE, stage="sft", batch=batch, micro_batch=batch, steps=steps, lr=2e-3, warmup_steps=50,
            weight_decay=0.01, precision="fp32", log_every=20, eval_every=max(1, steps // 15), seed=seed,
            save_minutes=1.0,
        )  # fmt: skip
        net = Llama(SHAPE, MEMORY).init_weights(seed).requires_grad_(True)
        objective = Objective(net, people.tokens)
        asked = {"held": questions(people, held, read), "known, closed book": questions(people, known, "none")}

        def evaluate(net: Llama, objective=objective, asked=asked) -> dict[str, float]:
            return {name: mean_loss(objective, samples, 64) for name, samples in asked.items()}

        source = Statements(people, read, begin, batch, seed)
        folder = out / arm.replace(" ", "-").replace("/", "-")
        run = Trainer(config, objective, source, folder, evaluate=evaluate, progress=Progress(progress))
        run.run()
        run.close()
        if run.step < steps:
            raise SystemExit(f"stopped in {arm!r} at step {run.step}; the same command goes on from there")
        found[arm] = [{"step": m["step"], **m["eval"]} for m in read_metrics(folder) if "eval" in m]
    (out / "people.json").write_text(json.dumps({"steps": steps, "batch": batch, "arms": found}, indent=1) + "\n")
    draw(found, out / "people.png")
    return found


def draw(found: dict[str, list[dict]], file: Path) -> None:
    """Loss over steps: of held-out people as each arm reads, and of known people without reading."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2),
        ("held", "known, closed book"),
        ("people of no training text, read as trained", "people of the training text, closed book"),
        strict=True,
    ):
        for arm, rows in found.items():
            axes.plot([r["step"] for r in rows], [r[key] for r in rows], marker=".", label=arm)
        axes.axhline(math.log(VALUES), color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="steps", ylabel="nats per answer", title=title)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/people"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for arm, rows in study(given.out, given.steps).items():
        print(f"{arm:22s}", "  ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k != "step"))
