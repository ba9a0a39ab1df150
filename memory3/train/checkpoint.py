"""Checkpoints of a run that survive `kill -9`: a folder per step, complete or not there.

    OUT/checkpoints/step-00000120/model.safetensors      weights being trained, as they are optimised
                                 /optimizer.safetensors  AdamW's two moments of each, and its step count
                                 /state.json             step, tokens seen, configuration

A folder is written under another name, flushed to disk and renamed; older ones are deleted only after that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_STEP = "step-"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """Where a run stands: steps done, tokens read by the model so far, seconds of work, and its configuration."""

    step: int
    tokens: int
    seconds: float
    config: str


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints below a run's folder, oldest first."""
    found = [p for p in (out / "checkpoints").glob(f"{_STEP}*") if p.name[len(_STEP) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(_STEP) :]))


def save(
    out: Path, state: State, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write a checkpoint and delete all but the newest `keep`. Returns its folder."""
    folder = out / "checkpoints"
    target = folder / f"{_STEP}{state.step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: w.detach().contiguous() for name, w in weights.items()}, partial / "model.safetensors")
    save_file(_moments(weights, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(vars(state)), encoding="utf-8")
    flush([*partial.iterdir(), partial])
    shutil.rmtree(target, ignore_errors=True)  # only a step written twice has one
    partial.rename(target)
    flush([folder])
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return target


def load(path: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Fill weights and optimizer in place. Raises ValueError when the checkpoint is of other weights."""
    found = load_file(path / "model.safetensors")
    check_names(path, weights, found)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(found[name])
    moments = load_file(path / "optimizer.safetensors")
    fused = bool(optimizer.param_groups[0].get("fused"))  # then the count of steps lies beside the weights
    for name, weight in weights.items():
        if f"{name}.step" in moments:
            device = weight.device
            slot = {key: moments[f"{name}.{key}"].to(device, copy=True) for key in _MOMENTS}
            count = moments[f"{name}.step"].to(device if fused else "cpu", copy=True)
            optimizer.state[weight] = {"step": count, **slot}
    return read_state(path)


def read_state(path: Path) -> State:
    """Step, tokens, seconds and configuration of a checkpoint."""
    return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def check_names(path: Path, weights: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the file holds these weights in these shapes."""
    lacking, extra = sorted(weights.keys() - found.keys()), sorted(found.keys() - weights.keys())
    shapes = [n for n in weights.keys() & found.keys() if weights[n].shape != found[n].shape]
    if lacking or extra or shapes:
        raise ValueError(
            f"{path} does not hold the weights of this run: lacking {lacking[:3]}, unknown {extra[:3]}, "
            f"of other shape {sorted(shapes)[:3]}; give the configuration it was made with"
        )


def flush(paths: Iterable[Path]) -> None:
    """fsync files and folders, so that a rename cannot come to disk before them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _moments(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        state = optimizer.state.get(weight)
        if state:
            out.update({f"{name}.{key}": state[key].contiguous() for key in _MOMENTS})
            out[f"{name}.step"] = state["step"]
    return out
