"""Decoding by one native call against decoding layer by layer, and the team of threads under it."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading

import pytest
import torch

import memory3.model.llama as llama
from memory3 import MemoryConfig, MemoryRead, ModelConfig
from memory3.model.cache import KVCache
from memory3.model.llama import Llama
from memory3.profiling import collect
from memory3_kernels import native_reason, pack_weight

from .common import cu, rel

pytestmark = pytest.mark.skipif(native_reason() is not None, reason="M3_NATIVE=0: this run covers the references")

CONFIG = ModelConfig(
    vocab_size=203, dim=64, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, ffn_dim=96, norm_eps=1e-5,
    rope_base=10000.0, rope_scaling=None, max_context=128, tied=False,
)  # fmt: skip
MEMORY = MemoryConfig(layers=(0, 2), tokens=4, span=16, prefix_ids=(1, 5, 6), context_bos_ids=(1,))
MAPPED = MemoryConfig(
    layers=(0, 2), head_map=((0, -1), (-1, 0)), tokens=4, span=16, prefix_ids=(1, 5, 6), context_bos_ids=(1,)
)


def model(memory: MemoryConfig | None = MEMORY, format: str = "dense") -> Llama:
    format, _, activations = format.partition("-")
    activations = activations or "bf16"
    net = Llama(CONFIG, memory).init_weights(3, std=0.15).to(torch.bfloat16).eval().requires_grad_(False)
    if format != "dense":
        for block in net.blocks:
            for linear in (block.qkv, block.out, block.gate_up, block.down):
                linear.packed, linear.weight = pack_weight(linear.weight, format, activations), None
        net.head.packed, net.head.weight = pack_weight(net.head.weight, "q8_0", activations), None
    return net


def near(format: str) -> float:
    """How far two ways may be apart: eight bits of activations round a value at an edge further away."""
    return 1e-1 if format.endswith("mxint8") else 5e-2


def reads(net: Llama, batch: int, bias: bool = False) -> MemoryRead:
    draw = torch.Generator().manual_seed(4)
    kv = torch.randn(5, *net.memory.record_shape(CONFIG), generator=draw).to(torch.bfloat16)
    slots = torch.randint(-1, 5, (batch, 3), generator=draw, dtype=torch.int32)
    length = torch.tensor([4, 2, 0, 3, 1], dtype=torch.int32)
    bias = torch.randn(5, len(net.memory.layers), *kv.shape[3:5], generator=draw) if bias else None
    return MemoryRead(kv, length, slots, None, bias, collect_mass=True)


def started(net: Llama, lengths: list[int], memory: bool) -> KVCache:
    cache = KVCache(CONFIG, len(lengths), 32, net.dtype)
    if memory:
        with torch.no_grad():
            cache.start(net.encode_prefix(MEMORY.prefix_ids, MEMORY.span))
    tokens = torch.arange(sum(lengths)) * 7 % 200
    net.prefill(tokens, cu(*lengths), cache)
    return cache


def steps(net: Llama, lengths: list[int], read: MemoryRead | None, count: int = 4):
    """Logits and mass of some steps, and the cache after them."""
    cache = started(net, lengths, read is not None)
    seen = []
    for i in range(count):
        tokens = torch.arange(len(lengths)) * 31 % 200 + i
        logits = net.decode(tokens, cache, read)
        seen.append((logits, None if read is None else read.mass))
    return seen, cache


@pytest.mark.parametrize("format", ["dense", "q8_0", "q4_1", "q4_1-mxint8"])
@pytest.mark.parametrize("kind", ["plain", "memory", "bias", "head map"])
@pytest.mark.parametrize("lengths", [[6], [5, 1, 9], [3] * 17], ids=len)
def test_one_call_equals_layer_by_layer(monkeypatch, format, kind, lengths):
    net = model(MAPPED if kind == "head map" else MEMORY, format)
    read = None if kind == "plain" else reads(net, len(lengths), kind == "bias")
    assert llama.serves(net)
    seen, cache = steps(net, lengths, read)
    monkeypatch.setattr(llama, "serves", lambda net: False)
    expected, want = steps(net, lengths, copy.copy(read))
    assert cache.lengths == want.lengths
    for (logits, mass), (slow, slow_mass) in zip(seen, expected, strict=True):
        assert rel(logits, slow) < near(format)
        if read is not None:
            assert torch.allclose(mass, slow_mass, atol=2e-2)
    assert max(rel(cache.k, want.k), rel(cache.v, want.v)) < 0.6 * near(format)


def prompts(net: Llama, read: MemoryRead | None, new: list[int], rows: list[int] | None = None):
    """Logits and mass of texts appended to sequences of 0, 5 and 2 rows, and the cache after them."""
    cache = started(net, [0, 5, 2], read is not None)
    tokens = torch.arange(sum(new)) * 13 % 200
    logits = net.prefill(tokens, cu(*new), cache, read, None if rows is None else torch.tensor(rows))
    return logits, None if read is None else read.mass, cache


@pytest.mark.parametrize("format", ["dense", "q8_0", "q4_1", "q4_1-mxint8"])
@pytest.mark.parametrize("kind", ["plain", "memory", "bias", "head map"])
@pytest.mark.parametrize("rows", [None, [0, 11, 4]], ids=["last", "rows"])
def test_prompts_in_one_call_equal_layer_by_layer(monkeypatch, format, kind, rows):
    net, new = model(MAPPED if kind == "head map" else MEMORY, format), [12, 0, 21]
    read = None
    if kind != "plain":
        read = reads(net, 5, kind == "bias")
        read.cu_chunk = torch.tensor([0, 8, 12, 12, 20, 33], dtype=torch.int32)
    got, mass, cache = prompts(net, copy.copy(read), new, rows)
    monkeypatch.setattr(llama, "serves", lambda net: False)
    want, want_mass, want_cache = prompts(net, copy.copy(read), new, rows)
    assert cache.lengths == want_cache.lengths
    assert rel(got, want) < near(format) and (rows is not None or not got[1].any())
    assert max(rel(cache.k, want_cache.k), rel(cache.v, want_cache.v)) < 0.6 * near(format)
    if read is not None:
        assert mass.shape == want_mass.shape == (33, 3) and torch.allclose(mass, want_mass, atol=2e-2)


def test_threads_do_not_change_a_bit_of_a_prompt():
    net, before, results = model(format="q4_1"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = KVCache(CONFIG, 7, 100, net.dtype)
            tokens = torch.arange(560) * 7 % 200  # more rows than a block holds
            results.append((net.prefill(tokens, cu(*[80] * 7), cache), cache.k, cache.v))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("with_memory", [False, True])
def test_one_call_is_as_accurate_as_layer_by_layer(monkeypatch, with_memory):
    net = model()
    exact = copy.deepcopy(net).float()
    read = reads(net, 2) if with_memory else None
    wide = None if read is None else dataclasses.replace(read, kv=read.kv.float())
    want = steps(exact, [5, 2], wide)[0]
    fast = steps(net, [5, 2], read)[0]
    monkeypatch.setattr(llama, "serves", lambda net: False)
    slow = steps(net, [5, 2], read)[0]
    for (a, _), (b, _), (logits, _) in zip(fast, slow, want, strict=True):
        assert 0 < rel(a, logits) < 1.2 * rel(b, logits)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_do_not_change_a_bit(batch):
    net, before = model(format="q4_1"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            results.append(steps(net, [4] * batch, reads(net, batch))[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for (logits, mass), (expected, want) in zip(other, results[0], strict=True):
            assert torch.equal(logits, expected) and torch.equal(mass, want)


def test_changed_weights_are_seen():
    net = model()
    cache = started(net, [3], False)
    first = net.decode(torch.tensor([9]), cache)
    with torch.no_grad():
        net.norm.weight.mul_(2.0)
    cache.lengths = [3]
    assert rel(net.decode(torch.tensor([9]), cache), 2 * first) < 1e-2
    with torch.no_grad():
        net.blocks[1].down.weight.zero_()
    cache.lengths = [3]
    changed = net.decode(torch.tensor([9]), cache)
    assert rel(changed, 2 * first) > 1e-2


def test_other_models_go_layer_by_layer():
    assert not llama.serves(model().float())
    with torch.device("meta"):
        assert not llama.serves(Llama(CONFIG).to(torch.bfloat16))


def test_several_python_threads_decode_at_once():
    net, before = model(format="q8_0"), torch.get_num_threads()
    torch.set_num_threads(2)
    expected = steps(net, [4, 2], None)[0]
    results: dict[int, list] = {}
    try:
        workers = [
            threading.Thread(target=lambda i=i: results.update({i: steps(net, [4, 2], None)[0]})) for i in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    for result in results.values():
        for (logits, _), (want, _) in zip(result, expected, strict=True):
            assert torch.equal(logits, want)
    assert len(results) == 4


def test_a_forked_child_decodes():
    """The team's threads do not exist in a child: it makes a team of its own."""
    net, before = model(format="q4_1"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (*_, (expected, _)), cache = steps(net, [4], None)
        token = torch.tensor([3])
        child = os.fork()
        if child == 0:
            cache.lengths[0] -= 1
            os._exit(0 if torch.equal(net.decode(token, cache), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_profile_has_the_stages():
    net = model()
    cache = started(net, [3, 2], True)
    with collect() as profile:
        net.prefill(torch.arange(9), cu(4, 5), cache)
        net.decode(torch.tensor([3, 4]), cache, reads(net, 2))
    assert {"linear", "attention", "other", "Python"} <= set(profile.seconds)
    assert all(seconds >= 0 for seconds in profile.seconds.values()) and profile.seconds["linear"] > 0
