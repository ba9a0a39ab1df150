"""A whole run: prepare, train, draw the loss, leave the result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data import Entry
from ..embed import SupportsEncode
from .config import TrainConfig
from .export import save_model
from .lora import lora_state, save_adapter
from .metrics import plot
from .parallel import World
from .prepare import Notify, Run, from_prepared, prepare
from .prepared import Prepared
from .progress import Progress
from .trainer import Trainer


def train(
    config: TrainConfig,
    out: Path,
    *,
    texts: Iterable[Entry] = (),
    references: Iterable[Entry] = (),
    bank: Path | None = None,
    exclude: Iterable[str] = (),
    embedder: SupportsEncode | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    notify: Notify | None = None,
    device: str | None = None,
    prepared: Path | None = None,
) -> dict[str, Any] | None:
    """Run `config` in the folder `out`, from where it stands; arguments as `prepare` takes them.

    prepared: a file of memory3.train.prepared, in place of texts, references, bank and embedder. device: None, "cpu" or
    "cuda".

    Returns {"result": folder of the model or adapter, "evaluation": {...}, "step": ...}; None in all processes but
    the first. The result is also written when the run was stopped early.
    """
    world = World.join(device)
    try:
        with world.in_turn():
            said = notify if world.first else None
            if prepared is not None:
                run = from_prepared(config, Prepared.load(prepared), world=world, notify=said)
            else:
                run = prepare(
                    config, out, texts, references=references, bank=bank, exclude=exclude, embedder=embedder,
                    world=world, notify=said,
                )  # fmt: skip
        bar = Progress(progress and world.first)
        trainer = Trainer(
            config, run.objective, run.source, out,
            evaluate=run.evaluate, world=world, tensorboard=tensorboard, progress=bar,
        )  # fmt: skip
        try:
            evaluation = trainer.run()
        finally:
            trainer.close()
            run.close()
        if not world.first:
            return None
        _draw(out, config, notify)
        return {"result": str(leave(config, run, out, trainer)), "evaluation": evaluation, "step": trainer.step}
    finally:
        world.leave()


def leave(config: TrainConfig, run: Run, out: Path, trainer: Trainer) -> Path:
    """Write OUT/adapter (LoRA) or OUT/model, as the weights stand; returns the folder."""
    if config.lora is None:
        save_model(out / "model", run.model.net, run.model.tokenizer)
        return out / "model"
    about = {
        "base": config.model, "base_hash": run.model.model_hash, "memory": config.memory, "stage": config.stage,
        "write": config.write, "read": config.read, "step": trainer.step, "tokens_seen": trainer.tokens,
    }  # fmt: skip
    save_adapter(out / "adapter", lora_state(run.model.net), config.lora, about)
    return out / "adapter"


def _draw(out: Path, config: TrainConfig, notify: Notify | None) -> None:
    try:
        plot(out, f"{config.name} {config.stage}")
    except ImportError as error:  # the numbers are in metrics.jsonl; the picture is a convenience
        (notify or (lambda what: None))(str(error))
