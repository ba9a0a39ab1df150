"""What a run reports: JSON lines, TensorBoard where asked for, and the loss as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINES = "metrics.jsonl"
PLOT = "loss.png"


class Metrics:
    """Appends to OUT/metrics.jsonl: {"step": ..., "loss": ...} and {"step": ..., "eval": {...}}.

    step         steps done so far; lines of later steps, left by a run that was killed after its last checkpoint,
                 are cut off
    tensorboard  also write OUT/tensorboard. Raises ImportError with the command that installs it.
    """

    def __init__(self, out: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = out / LINES
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _board(out / "tensorboard", step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; numbers, also those one level down, go to TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            flat = {f"{k}/{n}": v for k, d in values.items() if isinstance(d, Mapping) for n, v in d.items()}
            for name, value in {**values, **flat}.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a last line that was cut off by a crash is left out."""
    path = out / LINES
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot(out: Path, title: str = "") -> Path:
    """Draw training loss and evaluations over tokens as OUT/loss.png.

    Raises ImportError with the command that installs matplotlib, ValueError when there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the loss plot needs matplotlib; run: pip install 'memory3[train]' ({error})") from None
    lines = read_metrics(out)
    train = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    evals: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.get("eval", {}).items():
            evals.setdefault(name, []).append((line["tokens"], value))
    if not train and not evals:
        raise ValueError(f"{out / LINES} has no loss to draw yet")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=0.8, label="training")
    for name, points in evals.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="tokens seen", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / PLOT, dpi=120)
    return out / PLOT


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"TensorBoard is not installed; run: pip install 'memory3[train]' ({error})") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
