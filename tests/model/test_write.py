"""Writing references: batching, positions, selection rules, head maps, and what is never computed."""

import dataclasses

import pytest
import torch

from memory3 import MemoryConfig
from memory3.write import encode_references, write_memories

from .common import TINY, TINY_MEMORY, cu, random_ids, rel, tiny

REFERENCES = random_ids(torch.Generator().manual_seed(7), 16, 3, 1, 11, 16, 7)


def write(net, memory=TINY_MEMORY, references=REFERENCES, **kw):
    with torch.no_grad():
        prefix = net.encode_prefix(memory.prefix_ids, memory.span)
    return write_memories(net, memory, prefix, references, **kw)


def dense(net, reference, memory=TINY_MEMORY):
    """Rotated keys and values [L, n, Hkv, D] of one reference after the prefix, from a plain cache."""
    from memory3 import KVCache

    m = memory.prefix_len
    ids = [*memory.prefix_ids, *reference]
    cache = KVCache(TINY, 1, len(ids), torch.float32)
    net.prefill(torch.tensor(ids), cu(len(ids)), cache)
    return cache.k[:, 0, m:], cache.v[:, 0, m:]


@pytest.mark.parametrize("rule", ["received", "exp", "causal"])
def test_batched_equals_one_by_one(rule):
    memory = dataclasses.replace(TINY_MEMORY, rule=rule)
    net = tiny(memory=memory)
    together = write(net, memory, texts=[f"t{i}" for i in range(6)])
    for i, (one, reference) in enumerate(zip(together, REFERENCES, strict=True)):
        (alone,) = write(net, memory, [reference])
        assert one.token_ids == reference and one.text == f"t{i}"
        assert one.n_valid == alone.n_valid == min(4, len(reference))
        assert torch.equal(one.pos, alone.pos)
        assert rel(one.kv, alone.kv) < 1e-5


@pytest.mark.parametrize("rule", ["received", "causal"])
def test_records_are_rows_of_the_dense_cache(rule):
    memory = dataclasses.replace(TINY_MEMORY, rule=rule)
    net = tiny(memory=memory)
    for one in write(net, memory):
        keys, values = dense(net, one.token_ids)
        assert one.kv.is_contiguous() and one.kv.shape == (3, 2, 2, 4, 16)
        for i, layer in enumerate(memory.layers):
            for head in range(2):
                rows = one.pos[i, head, : one.n_valid].long()
                assert rows.tolist() == sorted(set(rows.tolist())) and rows[-1] < len(one.token_ids)
                assert rel(one.kv[i, 0, head, : one.n_valid], keys[layer, rows, head]) < 1e-5
                assert rel(one.kv[i, 1, head, : one.n_valid], values[layer, rows, head]) < 1e-5
        assert one.pos[:, :, one.n_valid :].eq(-1).all()
        assert one.kv[:, :, :, one.n_valid :].eq(0).all()


def test_the_paper_rule_keeps_what_receives_most_attention():
    """Memory3 section 3.2, straight from its formula: no mask, no RoPE, prefix left out, summed over the group."""
    net = tiny()
    reference = REFERENCES[0]
    (one,) = write(net, references=[reference])
    x = net.embed[torch.tensor([*TINY_MEMORY.prefix_ids, *reference])]
    qkv = net.blocks[0].project(x)[3:]  # of layer 0, whose input is the embedding itself
    for head in range(2):
        q, k = qkv[:, head * 3 : head * 3 + 3], qkv[:, 6 + head]
        weights = torch.softmax(torch.einsum("ihd,jd->hij", q, k) / 4, dim=-1).sum((0, 1))
        assert one.pos[0, head].tolist() == sorted(weights.topk(4).indices.tolist())


def test_layers_after_the_last_memory_layer_never_run():
    memory = dataclasses.replace(TINY_MEMORY, layers=(0, 1))
    net = tiny(memory=memory)
    with torch.no_grad():
        prefix = net.encode_prefix(memory.prefix_ids, memory.span)
        want, _ = encode_references(net, memory, prefix, REFERENCES[:2])
        for layer in (2, 3):
            net.blocks[layer].qkv.weight.fill_(float("nan"))
        net.blocks[1].out.weight.fill_(float("nan"))  # nor the last one's output
        net.blocks[1].down.weight.fill_(float("nan"))
        got, _ = encode_references(net, memory, prefix, REFERENCES[:2])
    assert torch.equal(got, want) and torch.isfinite(got).all()


def test_head_map_stores_only_the_heads_that_read():
    memory = dataclasses.replace(TINY_MEMORY, head_map=((0, -1), (-1, 0), (-1, 0)))
    full = write(tiny())
    some = write(tiny(memory=memory), memory)
    for one, all_heads in zip(some, full, strict=True):
        assert one.kv.shape == (3, 2, 1, 4, 16)
        for i, head in enumerate((0, 1, 1)):
            assert torch.equal(one.pos[i, 0], all_heads.pos[i, head])
            assert rel(one.kv[i, :, 0], all_heads.kv[i, :, head]) < 1e-5


def test_long_references_are_cut_and_empty_ones_refused(net):
    long = random_ids(torch.Generator().manual_seed(8), 30)[0]
    (one,) = write(net, references=[long])
    (cut,) = write(net, references=[long[:16]])
    assert one.token_ids == long[:16] and torch.equal(one.kv, cut.kv)
    with pytest.raises(ValueError, match=r"references\[1\] has no tokens"):
        write(net, references=[[3], []])
    with pytest.raises(ValueError, match=r"references\[0\] has a token id outside 0\.\.96"):
        write(net, references=[[97]])
    with pytest.raises(ValueError, match=r"texts must have one entry per reference \(1\), got 2"):
        write(net, references=[[3]], texts=["a", "b"])
    assert write(net, references=[]) == []


def test_progress_counts_references(net):
    seen = []
    write(net, progress=lambda done, total: seen.append((done, total)), batch_rows=16)
    assert seen[-1] == (6, 6) and len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_without_a_prefix_references_start_at_position_zero():
    memory = MemoryConfig(layers=(0, 3), tokens=4, span=16, rule="causal")
    net = tiny(memory=memory)
    (one,) = write(net, memory, [REFERENCES[3]])
    keys, _ = dense(net, REFERENCES[3], memory)
    assert rel(one.kv[1, 0, 0], keys[3, one.pos[1, 0].long(), 0]) < 1e-5
