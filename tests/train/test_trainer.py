"""The loop: it learns, resumes as if never interrupted, survives kill -9, and splits over processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memory3.train.checkpoint import checkpoints, read_state
from memory3.train.metrics import plot, read_metrics
from memory3.train.trainer import micro_batches

from .run_tiny import Pairs, config, trainer

PROGRAM = Path(__file__).with_name("run_tiny.py")
ROOT = PROGRAM.parent.parent.parent


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(out)[-1] / "model.safetensors")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    trainer(out).run()
    return out


def test_a_tiny_model_learns_to_read(tmp_path):
    """Values are drawn anew at every step: only the reference can tell them (ln 8 = 2.08 without)."""
    trainer(tmp_path / "with", steps=150, save_minutes=60).run()
    assert sum(losses(tmp_path / "with")[-10:]) / 10 < 0.5
    trainer(tmp_path / "without", Pairs(memory=False), steps=60, save_minutes=60).run()
    assert sum(losses(tmp_path / "without")[-10:]) / 10 > 1.9


class Crash(Pairs):
    def samples(self, step):
        if step == 7:
            raise RuntimeError("crash")
        return super().samples(step)


def test_resumed_equals_uninterrupted(whole, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, Crash()).run()
    state = read_state(checkpoints(tmp_path)[-1])
    assert state.step == 7 and state.tokens == 7 * 8 * 4
    trainer(tmp_path).run()
    assert losses(tmp_path) == losses(whole)
    mine, theirs = weights(tmp_path), weights(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_another_configuration_is_refused_but_more_steps_are_not(whole):
    with pytest.raises(ValueError, match="other lr"):
        trainer(whole, lr=1e-4)
    assert trainer(whole, steps=20).step == 12
    assert config() == type(config()).from_json(config().to_json())


def start(out: Path, steps: int, *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(PROGRAM), str(out), str(steps)], env=environment)


def test_killed_without_warning_it_loses_nothing_that_was_saved(tmp_path):
    """A checkpoint after every step, killed at any moment of that, again and again; then it goes on to the end."""
    rng, steps = random.Random(0), 300
    for _ in range(2):
        run, done = start(tmp_path, steps), len(losses(tmp_path))
        while len(losses(tmp_path)) < done + 20 and run.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.1)
        run.kill()
        run.wait()
        state = read_state(checkpoints(tmp_path)[-1])
        assert 20 <= state.step < steps
    reached = state.step
    resumed = trainer(tmp_path, steps=steps)
    assert resumed.step == reached
    resumed.config = config(steps=reached + 2)
    resumed.run()
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [*range(1, reached + 3)]


def test_asked_to_stop_it_saves_first(tmp_path):
    class Interrupt(Pairs):
        def samples(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().samples(step)

    before = signal.getsignal(signal.SIGTERM)
    assert trainer(tmp_path, Interrupt(), save_minutes=60).run() == {}
    assert read_state(checkpoints(tmp_path)[-1]).step == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_processes_equal_one(whole, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    assert start(tmp_path, 12, *launcher).wait() == 0
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)
    mine, theirs = weights(tmp_path), weights(whole)
    assert all(torch.allclose(mine[n], theirs[n], rtol=1e-3, atol=1e-4) for n in mine)


def test_accumulated_gradients_equal_one_batch(whole, tmp_path):
    trainer(tmp_path, micro_batch=8).run()
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)
    samples = [*Pairs(3).samples(0), *Pairs(2, memory=False).samples(0)]
    assert [b.cu.shape[0] - 1 for b in micro_batches(samples, 2)] == [2, 2, 1]


def test_evaluations_are_noted_and_drawn(tmp_path):
    trainer(tmp_path, evaluate=lambda net: {"held out": float(net.embed.mean())}, keep=1).run()
    found = [line["step"] for line in read_metrics(tmp_path) if "eval" in line]
    assert found == [0, 4, 8, 12] and len(checkpoints(tmp_path)) == 1
    assert plot(tmp_path, "tiny").stat().st_size > 5000


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.net.embed.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        run.run()
    assert not checkpoints(tmp_path)
