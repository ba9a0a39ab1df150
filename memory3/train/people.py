"""A controlled study, from scratch: invented people, told in one wording, stated in another.

    python -m memory3.train.people --out runs/people [--device cuda] [--arm "memory from scratch"] [--seed 1]

Runs of one small model see the same number of steps of the same statements: closed book, references as text, memory
from the first step, and memory after a third of the steps without it, which were closed book or with references as text
(Memory3, arXiv 2407.01178, figure 11: only a warmup on text is said to make memory help), or whose weights at its end
go on writing while reading is learned; and memory from the first step that keeps all tokens of a reference. Most people
of the training text are strangers met once, whose facts can only be read. The people the runs are evaluated on are in
no training text. A second evaluation asks closed book about known people: those who could be read about at every
meeting, and those who never could. Does knowledge leave the weights when it can be read?
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..config import MemoryConfig, ModelConfig
from ..model.llama import Llama
from .aligned import AlignedObjective, FrozenAligned
from .config import TrainConfig
from .invented import BOS, NAME, VALUE, Invented, Statements, questions, tokens
from .metrics import read_metrics
from .objective import Objective
from .packed import Packed
from .parallel import World
from .progress import Progress
from .trainer import Trainer, micro_batches


class Arm(NamedTuple):
    """What is read in the first third of the steps, and after it; whole: memories keep all tokens; frozen: they are
    written by the weights of the first third's end."""

    first: str
    read: str
    whole: bool = False
    frozen: bool = False


ARMS = {
    "closed book": Arm("none", "none"),
    "text": Arm("text", "text"),
    "memory from scratch": Arm("memory", "memory"),
    "memory after closed book": Arm("none", "memory"),
    "memory after text": Arm("text", "memory"),
    "memory after text, frozen": Arm("text", "memory", frozen=True),
    "memory of all tokens": Arm("memory", "memory", whole=True),
}
WARMUP = 1 / 3


@dataclass(frozen=True)
class Size:
    """Of a study: people (invented.Invented), model, and how it is trained.

    asked    people of a group in an evaluation, of which there are `evals`
    tokens   of a reference that a head keeps; there are 2 + 4 * (2 + fillers)
    """

    syllables: int
    group: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    memory_layers: int
    batch: int
    steps: int
    lr: float
    asked: int
    refs: int = 5
    fillers: int = 1
    tokens: int = 8
    evals: int = 30

    def but(self, changes: Sequence[str]) -> Size:
        """With other values, given as NAME=VALUE. Raises ValueError for an unknown name."""
        known = {f.name: float if f.name == "lr" else int for f in fields(self)}
        pairs = [change.split("=", 1) for change in changes]
        for pair in pairs:
            if len(pair) < 2 or pair[0] not in known:
                raise ValueError(f"--set: expected NAME=VALUE with one of {', '.join(known)}, got {'='.join(pair)!r}")
        return replace(self, **{name: known[name](value) for name, value in pairs})

    @property
    def people(self) -> Invented:
        return Invented(self.syllables, self.group, self.refs, self.fillers)

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.people.vocabulary, dim=self.dim, n_layers=self.layers, n_heads=self.heads,
            n_kv_heads=self.kv_heads, head_dim=self.head_dim, ffn_dim=2 * self.dim, max_context=512,
        )  # fmt: skip

    @property
    def memory(self) -> MemoryConfig:
        return MemoryConfig(
            layers=tuple(range(self.memory_layers)), tokens=self.tokens, span=32, refs=self.refs,
            context_bos_ids=(BOS,),
        )  # fmt: skip


SIZES = {
    "cuda": Size(
        syllables=256, group=512, layers=4, dim=256, heads=8, kv_heads=4, head_dim=64, memory_layers=3, batch=64,
        steps=4500, lr=1e-3, asked=512, refs=5,
    ),
    "cpu": Size(  # an hour on one core
        syllables=32, group=64, layers=4, dim=64, heads=4, kv_heads=4, head_dim=16, memory_layers=3, batch=32,
        steps=3000, lr=2e-3, asked=64, refs=2,
    ),
}  # fmt: skip


def answers(objective: Objective, packs: Sequence[Packed]) -> tuple[float, float]:
    """Nats per predicted token over all packs, and the share of them that are the most probable one."""
    net = objective.net
    sums = torch.zeros(2, device=net.embed.device)
    for pack in packs:
        logits = net.logits(objective.predicted(pack))
        nats = F.cross_entropy(logits, pack.targets, reduction="sum")
        sums += torch.stack((nats, (logits.argmax(-1) == pack.targets).sum()))
    nats, right = (sums / sum(len(pack.targets) for pack in packs)).tolist()
    return nats, right


def run(arm: str, out: Path, size: Size, device: torch.device, seed: int = 0, progress: bool = True) -> bool:
    """Train one arm in its folder of OUT, or go on where it stopped; whether it is at its end."""
    first, read, whole, frozen = ARMS[arm]
    people, place = size.people, folder(out, arm, seed)
    if whole:
        size = replace(size, tokens=people.length)
    config = TrainConfig(
        name=arm, shape=size.shape, stage="sft", read=read, batch=size.batch, micro_batch=size.batch, steps=size.steps,
        lr=size.lr, warmup_steps=100, weight_decay=0.01, precision="bf16" if device.type == "cuda" else "fp32",
        log_every=20, eval_every=max(1, size.steps // size.evals), seed=seed, save_minutes=10.0, keep=1,
    )  # fmt: skip
    net = Llama(size.shape, size.memory).init_weights(seed).to(device).requires_grad_(True)
    given = (net, tokens, people.length, range(VALUE, NAME))
    objective = FrozenAligned(*given, file=place / "writer.safetensors") if frozen else AlignedObjective(*given)
    source = Statements(people, first, read, round(WARMUP * size.steps), size.batch, seed)
    held, known, closed = (range(g * size.group, g * size.group + size.asked) for g in range(3))
    alone = "nothing" if read == "memory" else "none"
    sets = {
        "held": questions(people, held, read),
        "held, closed book": questions(people, held, alone),
        "known": questions(people, known, read),
        "known, closed book": questions(people, known, alone),
        "never read, closed book": questions(people, closed, alone),
    }
    asked = {
        name: [objective.pack(batch).to(device) for batch in micro_batches(samples, 512)]
        for name, samples in sets.items()
    }

    def evaluate(net: Llama) -> dict[str, float]:
        found = {}
        for name, packs in asked.items():
            found[name], found[f"{name}: right"] = answers(objective, packs)
        return found

    trainer = Trainer(
        config, objective, source, place, evaluate=evaluate, world=World(device=device),
        progress=Progress(progress),
    )  # fmt: skip
    trainer.run()
    trainer.close()
    return trainer.step >= size.steps


def folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}"


def collect(out: Path, seeds: Sequence[int] = range(8)) -> dict[str, dict[int, list[dict]]]:
    """Evaluations of all runs in OUT, by arm and seed, written to people.json and drawn."""
    found: dict[str, dict[int, list[dict]]] = {}
    for arm in ARMS:
        for seed in seeds:
            rows = [m for m in read_metrics(folder(out, arm, seed)) if "eval" in m]
            if rows:
                lines = [{"step": m["step"], **{k: round(v, 4) for k, v in m["eval"].items()}} for m in rows]
                found.setdefault(arm, {})[seed] = lines
    (out / "people.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    if found:
        draw(found, out / "people.png")
    return found


def draw(found: dict[str, dict[int, list[dict]]], file: Path) -> None:
    """Over steps: of held-out people as each arm reads, of known people without reading."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("held", "people of no training text, read as trained"),
        ("known, closed book", "known people that were read about, closed book"),
        ("never read, closed book", "known people never read about, closed book"),
    )
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for number, (arm, runs) in enumerate(found.items()):
            for i, rows in enumerate(runs.values()):
                axes.plot([r["step"] for r in rows], [r[key] for r in rows], color=f"C{number}",
                          linewidth=1.4 if i == 0 else 0.7, label=arm if i == 0 else None)  # fmt: skip
        axes.axhline(math.log(40), color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="steps", ylim=(0, 7))
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylabel("nats per answer")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/people"))
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arm", choices=tuple(ARMS), action="append", help="only this one (may be repeated)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=(), metavar="NAME=VALUE", help="other sizes, such as steps=500")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = SIZES[given.device].but(given.set)
    for arm in given.arm or ARMS:
        if not run(arm, given.out, size, torch.device(given.device), given.seed, not given.quiet):
            print(f"stopped in {arm!r}; the same command goes on from there")
            break
    for arm, runs in collect(given.out).items():
        for seed, rows in runs.items():
            numbers = "  ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k != "step")
            print(f"{arm} (seed {seed}, {rows[-1]['step']} steps): {numbers}")


if __name__ == "__main__":
    main()
