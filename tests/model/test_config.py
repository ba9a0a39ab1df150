"""Shapes, memories, identities: what is accepted, what is refused and how the refusal reads."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from memory3 import PRESETS, Identity, Memory, MemoryConfig
from memory3.identity import combine_hashes, hash_file, hash_files
from memory3.memory import stack_memories
from memory3.model.llama import Llama

from .common import TINY, TINY_MEMORY


def test_import_is_light():
    code = "import memory3, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_export_names_the_known_ones():
    import memory3

    with pytest.raises(AttributeError, match="load_model"):
        memory3.nonsense  # noqa: B018


def test_paper_shape_on_the_meta_device():
    preset = PRESETS["paper-2.4b"]
    with torch.device("meta"):
        net = Llama(preset.model, preset.memory)
    total = sum(p.numel() for p in net.parameters())
    outside = net.embed.numel() + net.head.weight.numel()
    assert round((total - outside) / 1e9, 3) == 2.433
    assert total - outside == preset.model.non_embedding_parameters
    assert net.embed.shape == (60416, 3200) and net.head.weight is not net.embed
    assert preset.memory.record_shape(preset.model) == (22, 2, 8, 8, 80)
    assert preset.memory.layers == tuple(range(22)) and preset.memory.rule == "received"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 20}, "head_dim must be a multiple of 8"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads, got 6 and 4"),
        ({"n_layers": 0}, "n_layers must be a positive int, got 0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling type must be one of"),
    ],
)
def test_model_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 0)}, "layers must be ascending"),
        ({"layers": ()}, "layers must be ascending"),
        ({"tokens": 17}, "tokens must be at most span, got tokens=17 and span=16"),
        ({"rule": "random"}, "rule must be one of"),
        ({"head_map": ((0, 1),)}, r"one row per memory layer \(3\), got 1"),
        ({"head_map": ((0, -1), (0, 0), (0, -1))}, r"row 1 \(layer 1\)"),
        ({"head_map": ((-1, -1),) * 3}, "at least one|leave a KV head"),
    ],
)
def test_memory_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_MEMORY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 4)}, "below the model's 4 layers, got 4"),
        ({"head_map": ((0,),) * 3}, "model's 2 KV heads, got 1"),
        ({"prefix_ids": (97,)}, "prefix_ids must be token ids below 97"),
        ({"span": 124}, "leave no position of max_context=128"),
    ],
)
def test_memory_config_must_fit_the_model(change, message):
    with pytest.raises(ValueError, match=message):
        Llama(TINY, dataclasses.replace(TINY_MEMORY, **change))


def test_head_map_gives_the_kv_heads_of_the_record():
    memory = MemoryConfig(layers=(0, 2), head_map=((1, -1, 0), (-1, 0, 1)), tokens=4)
    assert memory.record_heads(3) == 2
    assert memory.kv_heads(0, 3) == [2, 0]
    assert memory.kv_heads(1, 3) == [1, 2]


def test_memory_made_by_hand_is_checked():
    shape = TINY_MEMORY.record_shape(TINY)
    good = Memory(torch.zeros(shape))
    assert good.n_valid == 4 and good.pos.eq(-1).all() and good.nbytes == 4 * 3 * 2 * 2 * 4 * 16
    with pytest.raises(ValueError, match=r"kv must be a tensor \[layers, 2, heads, tokens, head_dim\]"):
        Memory(torch.zeros(3, 2, 4, 16))
    with pytest.raises(ValueError, match=r"n_valid must be in 0\.\.4"):
        Memory(torch.zeros(shape), n_valid=5)
    with pytest.raises(ValueError, match="bias must be"):
        Memory(torch.zeros(shape), bias=torch.zeros(3, 2, 5))
    wrong = Memory(torch.zeros(2, 2, 2, 4, 16))
    with pytest.raises(ValueError, match=r"memories\[1\]: .*2 memory layers, the model reads 3"):
        stack_memories([good, wrong], TINY, TINY_MEMORY, torch.float32)
    with pytest.raises(ValueError, match="dtype torch.bfloat16, got torch.float32"):
        stack_memories([good], TINY, TINY_MEMORY, torch.bfloat16)
    with pytest.raises(TypeError, match="must be a Memory"):
        stack_memories(["text"], TINY, TINY_MEMORY, torch.float32)


def test_stacked_bias_is_zero_where_a_memory_has_none():
    shape = TINY_MEMORY.record_shape(TINY)
    bias = torch.randn(3, 2, 4)
    _, length, stacked = stack_memories(
        [Memory(torch.zeros(shape), n_valid=2), Memory(torch.zeros(shape), bias=bias)], TINY, TINY_MEMORY, torch.float32
    )
    assert length.tolist() == [2, 4]
    assert stacked[0].eq(0).all() and torch.equal(stacked[1], bias)


def _identity(**change) -> Identity:
    base = dict(
        model_hash="a", tokenizer_hash="b", prefix_ids=(1, 2), context_bos_ids=(1,), layers=(0, 1),
        head_map=((0, -1), (-1, 0)), tokens=8, span=128, head_dim=64, record_heads=1, rope_base=1e4,
        rope_scaling={"rope_type": "linear", "factor": 2.0}, dtype="bfloat16", rule="causal", embedder="e",
    )  # fmt: skip
    return Identity(**{**base, **change})


def test_identity_round_trip_and_mismatches():
    one = _identity()
    assert Identity.from_json(one.to_json()) == one
    assert one.mismatches(_identity()) == []
    assert one.mismatches(_identity(tokens=16, rule="exp")) == [("tokens", 8, 16), ("rule", "causal", "exp")]
    with pytest.raises(ValueError, match="missing fields .*'rule'"):
        Identity.from_json(one.to_json().replace('"rule"', '"role"'))


def test_record_ids_depend_on_header_and_tokens():
    one = _identity()
    assert len(one.record_id([1, 2, 3])) == 16
    assert one.record_id([1, 2, 3]) == _identity().record_id((1, 2, 3))
    ids = {one.record_id([1, 2, 3]), one.record_id([1, 2]), one.record_id([]), _identity(tokens=9).record_id([1, 2, 3])}
    assert len(ids) == 4


def test_file_hashes_follow_content(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    first = hash_file(tmp_path / "a")
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    both = hash_files([tmp_path / "b", tmp_path / "a"])
    assert both == hash_files([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_bytes(b"other")
    assert hash_file(tmp_path / "a") != first and hash_files([tmp_path / "a", tmp_path / "b"]) != both
    assert combine_hashes("x", "y") != combine_hashes("y", "x")
