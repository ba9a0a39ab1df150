"""Configurations, learning rates, metrics, and what a run asks of a machine."""

from __future__ import annotations

import json
import sys

import pytest

from memory3.train.accounting import account
from memory3.train.config import LoRA, TrainConfig
from memory3.train.metrics import Metrics, plot, read_metrics
from memory3.train.presets import RUNS, run_config
from memory3.train.schedule import rate


def test_warmup_stable_decay():
    rates = [rate(s, 100, warmup=10, decay=0.2, floor=0.1) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and set(rates[9:80]) == {1.0}
    assert rates[80] < 1 and rates[99] == pytest.approx(0.1) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[80:], rates[81:], strict=False))


def test_cosine():
    rates = [rate(s, 100, kind="cosine", warmup=10) for s in range(100)]
    assert rates[9] == 1.0 and rates[54] == pytest.approx(0.5) and rates[99] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="schedule"):
        rate(0, 1, kind="linear")


def test_every_named_run_is_whole_and_survives_json():
    for name, stages in RUNS.items():
        assert set(stages) == {"warmup", "continual", "sft"}
        for stage, config in stages.items():
            assert config.stage == stage and config.name == name
            assert TrainConfig.from_json(config.to_json()) == config
            assert not config.changes(TrainConfig.from_json(config.to_json()))
    with pytest.raises(ValueError, match="paper-2.4b"):
        run_config("huge", "warmup")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stage": "rest"}, "stage"),
        ({"write": "never"}, "write"),
        ({"model": None}, "model, shape"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"eval_reads": ("all",)}, "eval_reads"),
    ],
)
def test_bad_values_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**{"model": "smollm2-135m", **options})
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="colour"):
        TrainConfig.from_json(json.dumps({"colour": 1}))


def test_the_paper_in_numbers():
    """2.4 G weights; batches of 4 M tokens; a continual step costs about twice a warmup step (section 3.5)."""
    warmup, continual = (account(run_config("paper-2.4b", s)) for s in ("warmup", "continual"))
    assert warmup.weights == pytest.approx(2.4e9, rel=0.02) and warmup.text_tokens == 2048 * 2048
    assert continual.reference_tokens == 2 * warmup.text_tokens
    assert 1.7 < continual.flops / warmup.flops < 2.2
    # Appendix A: 2.24 TFlops to learn 128 tokens; here with recomputation, 8 operations per weight and not 6.
    assert warmup.flops / (2048 * 16) == pytest.approx(2.24e12 * 8 / 6, rel=0.1)
    assert "tokens/s" in warmup.text() and account(run_config("smollm2-135m", "sft")).state_bytes < 2**30


def test_lines_of_a_lost_future_are_cut_off(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, {"loss": 1 / step, "tokens": step})
    metrics.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 6, "lo')
    metrics = Metrics(tmp_path, step=3)
    metrics.write(4, {"loss": 9.0, "tokens": 4})
    metrics.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 1 / 2, 1 / 3, 9.0]


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write(3, {"loss": 2.5, "eval": {"memory": 1.5}})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval/memory"}
    assert events.Scalars("eval/memory")[0].step == 3


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"memory3\[train\]"):
        Metrics(tmp_path, tensorboard=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"memory3\[train\]"):
        plot(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no loss"):
        plot(tmp_path)


@pytest.mark.parametrize(
    ("read", "evaluated"), [("memory", ("none", "memory")), ("text", ("none", "text")), ("none", ("none",))]
)
def test_an_evaluation_reads_what_the_run_reads(read, evaluated):
    config = TrainConfig(model="smollm2-135m", read=read)
    assert TrainConfig.from_json(config.to_json()).evaluated == evaluated
    assert TrainConfig(model="smollm2-135m", read=read, eval_reads=("memory",)).evaluated == ("memory",)
