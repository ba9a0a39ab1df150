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
from torch import nn

from ..model.llama import Llama
from . import checkpoint
from .batch import Batch, Sample, make_batch
from .config import TrainConfig
from .metrics import Metrics
from .objective import Objective
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
        self.net = objective.net
        self.net.checkpointing = config.checkpointing
        self._evaluate, self._progress = evaluate, progress or Progress(False)
        self.weights = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        if not self.weights:
            raise ValueError("objective: no parameter requires a gradient; net.requires_grad_(True), or add LoRA")
        matrices = [p for p in self.weights.values() if p.dim() > 1]
        others = [p for p in self.weights.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
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
        no longer finite: the last checkpoint is from before.
        """
        config = self.config
        found: dict[str, float] = {}
        saved_at = time.monotonic()
        with self._signals(), self._progress.started(self.step, config.steps):
            if self.step == 0:
                self._report(self._evaluation())
            while self.step < config.steps:
                began = time.monotonic()
                values, stop = self._step()
                spent = time.monotonic() - began
                self.seconds += spent
                if self.world.first and self.step % config.log_every == 0:
                    values["tokens_per_s"] = values.pop("new_tokens") / spent
                    self._metrics.write(self.step, {**values, "seconds": round(self.seconds, 3)})
                    self._progress.show(self.step, values)
                last = self.step == config.steps
                if (last or self.step % config.eval_every == 0) and not stop:
                    found = self._evaluation()
                    self._report(found)
                if last or stop or time.monotonic() - saved_at > 60 * config.save_minutes:
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

    def _step(self) -> tuple[dict[str, float], bool]:
        config, world = self.config, self.world
        torch.manual_seed((config.seed * 1_000_003 + self.step) * world.size + world.rank)  # dropout, if any
        share = config.batch // world.size  # neighbours stay together: they may share references
        mine = list(self.source.samples(self.step))[world.rank * share : (world.rank + 1) * share]
        batches = list(micro_batches(mine, config.micro_batch))
        predicted = sum(len(b.targets) for b in batches)
        total, new_tokens, stop = world.sums(predicted, sum(len(b.tokens) for b in batches), self._stop.is_set())
        factor = rate(self.step, config.steps, kind=config.schedule, warmup=config.warmup_steps,
                      decay=config.decay, floor=config.floor)  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        loss = 0.0
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else world.quiet(self.model):
                with self._autocast():
                    part = self.model(batch.to(world.device))
                (part * (world.size / total)).backward()  # gradients are averaged over the processes
            loss += part.item()
        norm = float(nn.utils.clip_grad_norm_(list(self.weights.values()), config.clip))
        (loss,) = world.sums(loss)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: loss {loss / total}, gradient norm {norm}; lower lr and start again from the last "
                "checkpoint"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(new_tokens)
        values = {"loss": loss / total, "lr": config.lr * factor, "grad_norm": norm, "tokens": self.tokens}
        return {**values, "new_tokens": new_tokens}, bool(stop)

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


def micro_batches(samples: Sequence[Sample], size: int) -> Iterator[Batch]:
    """Batches of at most `size` samples, those with memory apart from those without."""
    for kind in (False, True):
        group = [s for s in samples if bool(s.pieces) == kind]
        for start in range(0, len(group), size):
            yield make_batch(group[start : start + size])
