"""The decoder on a tiny random model: packing, caching, memory reading, gradients, full contexts."""

import dataclasses

import pytest
import torch

from memory3 import ContextFull, KVCache, MemoryConfig, MemoryRead
from memory3.model.layers import Linear
from memory3.model.llama import Llama
from memory3.model.rope import Rope, inverse_frequencies
from memory3.write import encode_references

from .common import TINY, TINY_MEMORY, cu, random_ids, rel, tiny

IDS = random_ids(torch.Generator().manual_seed(1), 9, 14, 5)


def packed(*sequences):
    return torch.tensor([t for s in sequences for t in s], dtype=torch.int64), cu(*map(len, sequences))


def random_read(chunks, slots, seed=0, bias=False, memory=TINY_MEMORY, config=TINY):
    g = torch.Generator().manual_seed(seed)
    shape = memory.record_shape(config)
    kv = torch.randn((4, *shape), generator=g)
    bias_tensor = torch.randn((4, shape[0], shape[2], shape[3]), generator=g) if bias else None
    return MemoryRead(
        kv, torch.tensor([4, 3, 0, 4], dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), chunks, bias_tensor
    )


@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_rope_agrees_with_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scalings = {
        None: None,
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    config = dataclasses.replace(TINY, rope_scaling=scalings[scaling], max_context=512)
    parameters = {"rope_type": "default", **(scalings[scaling] or {}), "rope_theta": TINY.rope_base}
    hf = LlamaConfig(
        hidden_size=48, num_attention_heads=6, head_dim=16, max_position_embeddings=512, rope_parameters=parameters
    )
    positions = torch.tensor([0, 1, 63, 200, 511])
    x = torch.randn(5, 3, 16)
    cos, sin = LlamaRotaryEmbedding(hf)(x, positions[None])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    rope = Rope(config)
    got = rope.rotate(x, rope.at(positions, torch.float32))
    assert rel(got, want[0].transpose(0, 1)) < 1e-5
    assert inverse_frequencies(config).shape == (8,)
    there_and_back = rope.shift(rope.shift(got, 37), -37)
    assert rel(there_and_back, got) < 1e-5
    moved = rope.rotate(x[:3], rope.at(positions[:3] + 100, torch.float32))
    assert rel(rope.shift(got[:3], 100), moved) < 1e-4


def test_packed_sequences_equal_each_alone(net):
    together = net(*packed(*IDS))
    alone = torch.cat([net(*packed(s)) for s in IDS])
    assert rel(together, alone) < 1e-5


def test_packed_memory_chunks_equal_each_sequence_alone(net):
    prefix = net.encode_prefix((1, 5, 6), 16)
    chunks = torch.tensor([0, 8, 9, 17, 23, 28], dtype=torch.int32)
    slots = [[0, 1], [-1, 3], [3, 2], [1, 1], [-1, -1]]
    together = net(*packed(*IDS), random_read(chunks, slots, bias=True), prefix)
    ranges = [(0, 2), (2, 4), (4, 5)]
    alone = []
    for sequence, (lo, hi) in zip(IDS, ranges, strict=True):
        read = random_read(chunks[lo : hi + 1] - chunks[lo], slots[lo:hi], bias=True)
        alone.append(net(*packed(sequence), read, prefix))
    assert rel(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("mode", ["plain", "memory"])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_equal_the_packed_forward(net, mode, batch):
    sequences = IDS[:batch]
    prefix = net.encode_prefix((1, 5, 6), 16)
    cache = KVCache(TINY, batch, 40, torch.float32)
    slots = [[0, 3], [1, -1], [2, 3]][:batch]
    whole = read = step = None
    if mode == "memory":
        cache.start(prefix)
        whole = random_read(cu(*map(len, sequences)), slots)
        read = random_read(cu(*(len(s) - 4 for s in sequences)), slots)
        step = random_read(None, slots)
    want = net(*packed(*sequences), whole, prefix if mode == "memory" else None)
    ends = cu(*map(len, sequences))[1:].long()
    got = net.prefill(*packed(*(s[:-4] for s in sequences)), cache, read)
    assert rel(got, want[ends - 5]) < 1e-5
    for back in (4, 3, 2, 1):
        got = net.decode(torch.tensor([s[-back] for s in sequences]), cache, step)
        assert rel(got, want[ends - back]) < 1e-5
    assert cache.lengths == [len(s) + cache.prefix_len for s in sequences]
    assert cache.length.dtype == torch.int32
    assert cache.nbytes == sum(cache.lengths) * 2 * 4 * 2 * 16 * 4


def test_prefill_continues_a_conversation(net):
    want = net(*packed(*IDS))
    cache = KVCache(TINY, 3, 16, torch.float32)
    net.prefill(*packed(IDS[0][:3], IDS[1][:6], []), cache)
    got = net.prefill(*packed(IDS[0][3:], [], IDS[2]), cache, rows=torch.arange(11))
    assert rel(got[:6], want[3:9]) < 1e-5 and rel(got[6:], want[23:]) < 1e-5
    last = net.prefill(*packed([], IDS[1][6:], []), cache)
    assert rel(last[1], want[22]) < 1e-5
    assert last[0].eq(0).all() and last[2].eq(0).all()
    assert cache.lengths == [9, 14, 5]


def test_a_shrinking_batch_keeps_its_sequences(net):
    cache = KVCache(TINY, 3, 16, torch.float32)
    net.prefill(*packed(*(s[:-1] for s in IDS)), cache)
    got = net.decode(torch.tensor([IDS[2][-1], IDS[0][-1]]), cache.keep([2, 0]))
    want = net(*packed(*IDS))
    assert rel(got, want[[27, 8]]) < 1e-5
    assert cache.lengths == [8, 13, 4]


def test_every_token_of_every_layer_as_memory_equals_attention():
    """A reference read as memory is the same as having it in the context at the same positions."""
    memory = MemoryConfig(layers=range(4), tokens=16, span=16, prefix_ids=(1, 5, 6), context_bos_ids=(1,))
    net = tiny(memory=memory)
    reference, text = random_ids(torch.Generator().manual_seed(2), 16, 11)
    prefix = net.encode_prefix(memory.prefix_ids, memory.span)
    kv, pos = encode_references(net, memory, prefix, [reference])
    assert pos[0, 0, 0].tolist() == list(range(16))
    read = MemoryRead(
        kv, torch.tensor([16], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int32), cu(11), collect_mass=True
    )
    got = net(*packed(text), read, prefix)
    want = net(*packed([1, 5, 6, *reference, *text]))[19:]
    assert rel(got, want) < 1e-4
    assert read.mass.shape == (11, 1) and ((read.mass > 0) & (read.mass < 1)).all()
    without = net(*packed(text), None, prefix)
    assert rel(without, want) > 0.05  # the reference matters here


def test_mass_is_the_mean_over_memory_layers_and_heads(net):
    read = random_read(cu(5), [[0, -1, 2]])
    read.collect_mass = True
    net(*packed(IDS[2]), read)
    assert read.mass.shape == (5, 3)
    assert read.mass[:, 0].gt(0).all() and read.mass[:, 1:].eq(0).all()
    first = read.mass
    net(*packed(IDS[2]), read)
    assert torch.equal(first, read.mass)  # each call starts anew


def test_only_memory_layers_read_memory():
    """Keys of layers up to the memory layer are those of the plain model; later ones have seen the memory."""
    memory = dataclasses.replace(TINY_MEMORY, layers=(2,))
    net = tiny(memory=memory)
    caches = [KVCache(TINY, 1, 8, torch.float32) for _ in range(2)]
    net.prefill(*packed(IDS[2]), caches[0])
    net.prefill(*packed(IDS[2]), caches[1], random_read(cu(5), [[0]], memory=memory))
    plain, reading = (cache.k[:, 0, :5] for cache in caches)
    assert torch.equal(plain[:3], reading[:3])
    assert rel(reading[3], plain[3]) > 1e-2


def test_heads_mapped_to_minus_one_read_nothing():
    memory = dataclasses.replace(TINY_MEMORY, head_map=((0, -1), (-1, 0), (0, -1)))
    net = tiny(memory=memory)
    shape = memory.record_shape(TINY)
    assert shape == (3, 2, 1, 4, 16)
    one = random_read(cu(5), [[0]], memory=memory)
    full = tiny()
    spread = MemoryRead(torch.zeros(4, 3, 2, 2, 4, 16), one.length, one.slots, one.cu_chunk, torch.zeros(4, 3, 2, 4))
    spread.bias.fill_(float("-inf"))
    for i, head in enumerate((0, 1, 0)):
        spread.kv[:, i, :, head] = one.kv[:, i, :, 0]
        spread.bias[:, i, head] = 0
    assert rel(net(*packed(IDS[2]), one), full(*packed(IDS[2]), spread)) < 1e-5


def test_gradients_reach_weights_prefix_and_memories():
    net = tiny().requires_grad_(True)
    prefix = net.encode_prefix((1, 5, 6), 16)
    kv, _ = encode_references(net, TINY_MEMORY, prefix, IDS[:2])
    kv.retain_grad()
    read = MemoryRead(kv, torch.tensor([4, 4], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32), cu(5))
    logits = net(*packed(IDS[2]), read, prefix)
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[2][1:])).backward()
    assert kv.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_gradient_through_memory_is_right():
    """Directional derivative in a weight against finite differences, in fp64."""
    net = tiny(torch.float64).requires_grad_(True)
    weight = net.blocks[0].qkv.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss():
        prefix = net.encode_prefix((1, 5, 6), 16)
        kv, pos = encode_references(net, TINY_MEMORY, prefix, [IDS[0]])
        read = MemoryRead(kv, torch.tensor([4], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int32), cu(5))
        logits = net(*packed(IDS[2]), read, prefix)
        return torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[2])), pos

    value, pos = loss()
    value.backward()
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
        up, pos_up = loss()
        weight -= 2 * step * direction
        down, pos_down = loss()
    assert torch.equal(pos, pos_up) and torch.equal(pos, pos_down)
    numeric = float(up - down) / (2 * step)
    exact = float((weight.grad * direction).sum())
    assert exact == pytest.approx(numeric, rel=1e-5)


def test_full_cache_is_refused_before_anything_is_written(net):
    cache = KVCache(TINY, 2, 8, torch.float32)
    net.prefill(*packed(IDS[0][:6], IDS[1][:8]), cache)
    before = cache.k.clone()
    with pytest.raises(ContextFull, match="sequence 1 holds 8 rows and needs 1 more, but at most 8 fit"):
        net.decode(torch.tensor([3, 3]), cache)
    with pytest.raises(ContextFull, match="sequence 0 holds 6 rows and needs 3 more"):
        net.prefill(*packed([3, 3, 3], []), cache)
    assert cache.lengths == [6, 8] and torch.equal(cache.k, before)


def test_positions_end_at_max_context(net):
    cache = KVCache(TINY, 1, 1000, torch.float32).start(net.encode_prefix((1, 5, 6), 16))
    assert cache.limit == 112  # 128 positions less the span
    net.prefill(*packed([7] * 109), cache)
    with pytest.raises(ContextFull, match="max_context 128, span 16"):
        net.decode(torch.tensor([7]), cache)
    with pytest.raises(ValueError, match="exceeds max_context=128"):
        net(*packed([7] * 129))


def test_sliding_drops_the_oldest_and_moves_keys_back(net):
    """The first layer's keys depend on the token and its position alone, so they can be compared exactly."""
    prefix = net.encode_prefix((1, 5, 6), 16)
    text = random_ids(torch.Generator().manual_seed(4), 30)[0]
    cache = KVCache(TINY, 1, 20, torch.float32, overflow="slide", slide=6, pinned=1).start(prefix)
    net.prefill(*packed(text[:17]), cache)
    assert cache.lengths == [20]
    net.decode(torch.tensor([text[17]]), cache)
    assert cache.lengths == [15]  # 6 went, 1 came
    kept = [text[0], *text[7:18]]
    fresh = KVCache(TINY, 1, 20, torch.float32).start(prefix)
    net.prefill(*packed(kept), fresh)
    assert rel(cache.k[0, 0, :15], fresh.k[0, 0, :15]) < 1e-5
    assert rel(cache.v[0, 0, :15], fresh.v[0, 0, :15]) < 1e-5
    for token in text[18:]:
        net.decode(torch.tensor([token]), cache)
    assert max(cache.positions([0]), default=0) < TINY.max_context
    assert cache.lengths[0] <= 20
    with pytest.raises(ContextFull, match="smaller pieces"):
        net.prefill(*packed([3] * 17), cache)


def test_sliding_moves_only_the_full_sequence(net):
    cache = KVCache(TINY, 2, 10, torch.float32, overflow="slide", slide=3)
    net.prefill(*packed(IDS[1][:10], IDS[0][:4]), cache)
    untouched = cache.k[:, 1, :4].clone()
    net.decode(torch.tensor([3, 3]), cache)
    assert cache.lengths == [8, 5]
    assert torch.equal(cache.k[:, 1, :4], untouched)


def test_wrong_reads_are_refused(net):
    cache = KVCache(TINY, 1, 8, torch.float32)
    read = random_read(None, [[0]])
    with pytest.raises(ValueError, match="read.cu_chunk must be given"):
        net.prefill(*packed([3]), cache, read)
    with pytest.raises(ValueError, match=r"read.slots must be \[1, R\], got \(2, 1\)"):
        net.decode(torch.tensor([3]), cache, random_read(None, [[0], [0]]))
    read.kv = read.kv[..., :8]
    with pytest.raises(ValueError, match=r"read.kv must be \[S, 3, 2, 2, 4, 16\]"):
        net.decode(torch.tensor([3]), cache, read)
    with pytest.raises(ValueError, match="cu must ascend from 0 to the 3 tokens"):
        net(torch.tensor([1, 2, 3]), cu(2))
    with pytest.raises(ValueError, match="needs a model with a memory configuration"):
        tiny(memory=None)(*packed([3]), random_read(cu(1), [[0]]))


def test_copies_and_other_memory_shapes_keep_the_weights():
    import copy

    net = Llama(dataclasses.replace(TINY, tied=True), TINY_MEMORY).init_weights(std=0.3).requires_grad_(False)
    want = net(*packed(IDS[0]))
    with torch.no_grad():
        net(*packed(IDS[0]))  # weights are packed now
    twin = copy.deepcopy(net)
    assert twin.head.weight is twin.embed and twin.embed is not net.embed
    assert rel(twin(*packed(IDS[0])), want) < 1e-6
    other = net.with_memory(MemoryConfig(layers=(3,), tokens=2, span=8))
    assert other.embed is net.embed and other.memory.layers == (3,) and net.memory is TINY_MEMORY
    assert torch.equal(other(*packed(IDS[0])), want)
    with pytest.raises(ValueError, match="below the model's 4 layers"):
        net.with_memory(MemoryConfig(layers=(4,), tokens=2, span=8))


def test_no_tokens_no_logits(net):
    assert net(*packed([])).shape == (0, 97)
    cache = KVCache(TINY, 0, 8, torch.float32)
    assert net.prefill(torch.empty(0, dtype=torch.int64), cu(), cache).shape == (0, 97)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_weight_follows_the_weight(dtype):
    linear = Linear(32, 48).to(dtype)
    with torch.no_grad():
        linear.weight.normal_()
        for rows in (1, 3, 40):
            x = torch.randn(rows, 32).to(dtype)
            assert rel(linear(x).float(), x.float() @ linear.weight.float().T) < 1e-2
        linear.weight.mul_(2)  # what an optimiser does
        assert rel(linear(x).float(), x.float() @ linear.weight.float().T) < 1e-2
        linear.weight.data = torch.randn(48, 32).to(dtype)
        assert rel(linear(x).float(), x.float() @ linear.weight.float().T) < 1e-2
    assert linear(x).requires_grad
