"""The loop: steps, learning rate, checkpoints, reports. What a step computes follows from the configuration and its
number alone, so that a resumed run does what an uninterrupted one would have done."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..model.llama import Llama
from . import checkpoint
from .ahead import in_background
from .batch import Batch, Sample, make_batch
from .config import TrainConfig
from .metrics import Metrics
from .objective import Objective
from .packed import Packed
from .parallel import World
from .progress import Progress
from .schedule import rate

Evaluate = Callable[[Llama], dict[str, float]]


class Source(Protocol):
    """Training data."""

    def samples(self, step: int) -> Sequence[Sample]:
        """The sequences of a step over all processes; the same at every call."""
        ...


class Trainer:
    """Trains the parameters of `objective.net` that require gradients.

    out        folder of the run: checkpoints, metrics.jsonl
    evaluate   called every config.eval_every steps and at the end; its numbers go into the metrics
    Goes on from the newest checkpoint in `out`. Raises ValueError when that was made with another configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        source: Source,
        out: Path,
        *,
        evaluate: Evaluate | None = None,
        world: World | None = None,
        tensorboard: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.source, self.out = config, source, out
        self.world = world or World()
        if config.batch % self.world.size:
            raise ValueError(f"batch: expected a multiple of the {self.world.size} processes, got {config.batch}")
        self.net, self._objective = objective.net, objective
        self.net.checkpointing = config.checkpointing
        self._evaluate, self._progress = evaluate, progress or Progress(False)
        self.weights = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        if not self.weights:
            raise ValueError("objective: no parameter requires a gradient; net.requires_grad_(True), or add LoRA")
        matrices = [p for p in self.weights.values() if p.dim() > 1]
        others = [p for p in self.weights.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        fused = self.world.device.type == "cuda" or None
        groups = [g for g in groups if g["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self._resume()
        self.model = self.world.wrap(objective)
        self._metrics = None
        if self.world.first:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(config.to_json(), encoding="utf-8")
            self._metrics = Metrics(out, self.step, tensorboard)
        self._stop = threading.Event()

    def _resume(self) -> None:
        found = checkpoint.checkpoints(self.out)
        if not found:
            return
        state = checkpoint.read_state(found[-1])
        changed = self.config.changes(TrainConfig.from_json(state.config))
        if changed:
            raise ValueError(
                f"{self.out} holds a run with other {', '.join(changed)}; give the same configuration to resume it, "
                "or another folder"
            )
        checkpoint.load(found[-1], self.weights, self.optimizer)
        self.step, self.tokens, self.seconds = state.step, state.tokens, state.seconds

    def run(self) -> dict[str, float]:
        """Train to config.steps, or until SIGINT or SIGTERM: then the step is finished and saved first.

        Returns the last evaluation (empty without one, or when stopped). Raises FloatingPointError when the loss is
        no longer finite: the last checkpoint is from before. A GPU is asked for it at the steps that are logged,
        evaluated or saved.
        """
        config = self.config
        found: dict[str, float] = {}
        saved_at = time.monotonic()
        with self._signals(), self._progress.started(self.step, config.steps), self._ahead() as ahead:
            if self.step == 0:
                self._report(self._evaluation())
            spent, read = 0.0, 0  # since the last line of metrics
            while self.step < config.steps:
                began, number = time.monotonic(), self.step + 1
                logs, last = number % config.log_every == 0, number == config.steps
                evaluates = last or number % config.eval_every == 0
                saves = last or began - saved_at > 60 * config.save_minutes
                values, stop = self._step(next(ahead), logs or evaluates or saves)
                now = time.monotonic() - began
                self.seconds, spent, read = self.seconds + now, spent + now, read + values.pop("new_tokens")
                if self.world.first and logs:
                    values["tokens_per_s"] = read / spent
                    self._metrics.write(self.step, {**values, "seconds": round(self.seconds, 3)})
                    self._progress.show(self.step, values)
                if logs:
                    spent, read = 0.0, 0
                if evaluates and not stop:
                    found = self._evaluation()
                    self._report(found)
                if saves or stop:
                    self.save()
                    saved_at = time.monotonic()
                if stop:
                    return {}
        return found

    def save(self) -> None:
        """Write a checkpoint (the first process does)."""
        if self.world.first:
            state = checkpoint.State(self.step, self.tokens, self.seconds, self.config.to_json())
            checkpoint.save(self.out, state, self.weights, self.optimizer, self.config.keep)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    # ---- one step --------------------------------------------------------------------------------------------------

    @contextmanager
    def _ahead(self) -> Iterator[Iterator[list[Packed]]]:
        """This process' micro-batches of each step to come; for a GPU a thread makes them ahead."""
        steps, on_gpu = range(self.step, self.config.steps), self.world.device.type == "cuda"
        share = self.config.batch // self.world.size

        def packs(step: int) -> list[Packed]:
            # Neighbours stay together: they may share references.
            mine = list(self.source.samples(step))[self.world.rank * share : (self.world.rank + 1) * share]
            made = [self._objective.pack(b) for b in micro_batches(mine, self.config.micro_batch, mixed=True)]
            return [p.pin_memory() for p in made] if on_gpu else made

        if on_gpu:
            with in_background(map(packs, steps)) as made:
                yield made
        else:
            yield map(packs, steps)

    def _step(self, packs: list[Packed], measure: bool) -> tuple[dict[str, float], bool]:
        """measure: look at loss and gradient norm, which waits for the device. Returns values, and whether to stop."""
        config, world = self.config, self.world
        torch.manual_seed((config.seed * 1_000_003 + self.step) * world.size + world.rank)  # dropout, if any
        predicted, text = sum(p.predicted for p in packs), sum(p.text for p in packs)
        total, new_tokens, stop = world.sums(predicted, text, self._stop.is_set())
        factor = rate(self.step, config.steps, kind=config.schedule, warmup=config.warmup_steps,
                      decay=config.decay, floor=config.floor)  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        parts = []
        for i, batch in enumerate(packs):
            last = i == len(packs) - 1
            with nullcontext() if last else world.quiet(self.model):
                with self._autocast():
                    part = self.model(batch.to(world.device, non_blocking=True))
                (part * (world.size / total)).backward()  # gradients are averaged over the processes
            parts.append(part.detach())
        norm = nn.utils.clip_grad_norm_(list(self.weights.values()), config.clip)
        values = {"lr": config.lr * factor, "new_tokens": new_tokens}
        if measure or stop or world.size > 1 or world.device.type == "cpu":
            values |= self._measured(parts, norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(new_tokens)
        return {**values, "tokens": self.tokens}, bool(stop)

    def _measured(self, parts: list[Tensor], norm: Tensor, total: float) -> dict[str, float]:
        """A step's loss per predicted token and gradient norm. Raises FloatingPointError when one is not finite."""
        (loss,) = self.world.sums(sum(part.item() for part in parts))
        norm = float(norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: loss {loss / total}, gradient norm {norm}; lower lr and start again from the last "
                "checkpoint"
            )
        return {"loss": loss / total, "grad_norm": norm}

    def _autocast(self):
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _evaluation(self) -> dict[str, float]:
        if self._evaluate is None or not self.world.first:
            return {}
        self.net.eval()
        with torch.no_grad(), self._autocast():
            found = self._evaluate(self.net)
        self.net.train()
        return found

    def _report(self, found: dict[str, float]) -> None:
        if found and self._metrics is not None:
            self._metrics.write(self.step, {"tokens": self.tokens, "seconds": round(self.seconds, 3), "eval": found})
            self._progress.note(self.step, found)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step they come in."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, lambda *_: self._stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def micro_batches(samples: Sequence[Sample], size: int, mixed: bool = False) -> Iterator[Batch]:
    """Batches of at most `size` samples, those with memory apart from those without unless they may be mixed."""
    groups = [samples] if mixed else [[s for s in samples if bool(s.pieces) == kind] for kind in (False, True)]
    for group in groups:
        for start in range(0, len(group), size):
            yield make_batch(group[start : start + size], mixed)
