"""The loss of a batch and its gradient: through reading, through writing, frozen and live."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model.common import cu, rel, tiny

from memory3.config import MemoryConfig
from memory3.train.batch import Piece, Sample, make_batch
from memory3.train.objective import Objective, token_loss, write_live
from memory3.write import encode_references, write_memories
from memory3_kernels import use_backend

from .common import memory_samples, reference_tokens, trainable


def gradients(net, batch, **options) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    loss = Objective(net, **options)(batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def frozen(net):
    """What a bank would give: memories written once by these weights."""

    def load(ids):
        prefix = net.encode_prefix(net.memory.prefix_ids, net.memory.span)
        memories = write_memories(net, net.memory, prefix, [reference_tokens(i) for i in ids])
        return torch.stack([m.kv for m in memories]), torch.tensor([m.n_valid for m in memories], dtype=torch.int32)

    with torch.no_grad():
        table = {bytes([i]): [x[0] for x in load([bytes([i])])] for i in range(4)}
    return lambda ids: tuple(torch.stack(x) for x in zip(*(table[i] for i in ids), strict=True))


@pytest.mark.parametrize("mode", ["live", "frozen", "none"])
def test_gradient_is_that_of_finite_differences(mode):
    """Every kind of weight of the first, a middle and the last layer, in a random direction, in fp64."""
    net = trainable(tiny(torch.float64))
    samples = memory_samples()
    if mode == "none":
        samples = [Sample(s.ids, s.first) for s in samples]
    batch = make_batch(samples)
    options = {"tokens": reference_tokens} if mode == "live" else {"load": frozen(net)}
    with use_backend("reference"):
        _, grads = gradients(net, batch, **options)
        objective = Objective(net, **options)
        generator = torch.Generator().manual_seed(1)
        for name in ["embed", "head.weight", *(f"blocks.{b}.{p}.weight" for b in (0, 1, 3)
                     for p in ("attn_norm", "qkv", "out", "ffn_norm", "gate_up", "down"))]:  # fmt: skip
            weight = net.get_parameter(name)
            direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            step, before = 1e-6, weight.detach().clone()
            with torch.no_grad():
                losses = []
                for sign in (1, -1):
                    weight.copy_(before + sign * step * direction)
                    losses.append(float(objective(batch)))
                weight.copy_(before)
            expected = (losses[0] - losses[1]) / (2 * step)
            actual = float((grads[name] * direction).sum())
            assert actual == pytest.approx(expected, rel=2e-5, abs=2e-5), name


def test_live_write_trains_what_frozen_write_cannot():
    """With memory in the first layer only, its references reach the loss through that layer's keys and values alone."""
    net = trainable(tiny(memory=MemoryConfig((0,), tokens=4, span=16, prefix_ids=(1, 5), context_bos_ids=(1,))))
    batch = make_batch(memory_samples(memory=net.memory))
    loss_frozen, without = gradients(net, batch, load=frozen(net))
    loss_live, live = gradients(net, batch, tokens=reference_tokens)
    assert loss_live == pytest.approx(loss_frozen, rel=1e-6)
    assert rel(live["blocks.0.qkv.weight"], without["blocks.0.qkv.weight"]) > 0.01
    # Hidden states of references end with the last memory layer: later layers see the text alone.
    for name in ("blocks.0.out.weight", "blocks.0.down.weight", "blocks.1.qkv.weight", "blocks.3.down.weight"):
        assert rel(live[name], without[name]) < 1e-5, name


def test_checkpointing_changes_nothing():
    net = trainable(tiny())
    batch = make_batch(memory_samples())
    loss, grads = gradients(net, batch, tokens=reference_tokens)
    net.checkpointing = True
    again, same = gradients(net, batch, tokens=reference_tokens)
    assert loss == again and grads.keys() == same.keys()
    assert all(rel(same[name], grads[name]) < 1e-5 for name in grads)


def test_autocast_is_close_to_fp32():
    net = trainable(tiny())
    batch = make_batch(memory_samples())
    loss, grads = gradients(net, batch, tokens=reference_tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, rounded = gradients(net, batch, tokens=reference_tokens)
        with torch.no_grad():  # as evaluation runs it
            assert float(Objective(net, reference_tokens)(batch)) == pytest.approx(low, rel=1e-3)
    assert low == pytest.approx(loss, rel=0.03) and low != loss
    assert all(g.dtype is torch.float32 for g in rounded.values())
    assert rel(rounded["blocks.1.qkv.weight"], grads["blocks.1.qkv.weight"]) < 0.3


def test_written_in_the_order_of_the_references():
    net = tiny()
    prefix = net.encode_prefix(net.memory.prefix_ids, net.memory.span)
    references = [reference_tokens(bytes([i])) for i in (9, 0, 13, 4, 4)]
    expected, _ = encode_references(net, net.memory, prefix, references)
    torch.testing.assert_close(write_live(net, prefix, references), expected)
    assert write_live(net, prefix, []).shape == (0, *net.memory.record_shape(net.config))


def test_loss_is_cross_entropy_in_any_number_of_parts(monkeypatch):
    net = trainable(tiny())
    hidden = torch.randn(11, net.config.dim, requires_grad=True)
    targets = torch.arange(11)
    expected = F.cross_entropy(net.logits(hidden), targets, reduction="sum")
    (grad,) = torch.autograd.grad(expected, hidden)
    monkeypatch.setattr("memory3.train.objective.HEAD_ROWS", 4)
    total = token_loss(net, hidden, targets)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], grad)
    assert token_loss(net, hidden[:0], targets[:0]).item() == 0


def test_a_batch_predicts_what_follows_and_shares_slots():
    samples = memory_samples()
    batch = make_batch(samples)
    text = [t for s in samples for t in s.ids]
    assert batch.cu.tolist() == cu(14, 20).tolist() and batch.cu_chunk.tolist() == [0, 9, 14, 23, 31, 34]
    assert [text[r + 1] for r in batch.rows.tolist()] == batch.targets.tolist()
    assert batch.rows.tolist() == [*range(13), *range(14, 33)]
    assert batch.reads == tuple(bytes([i]) for i in range(4))
    assert batch.slots.tolist() == [[0, -1], [0, 1], [0, 1], [1, 2], [2, 3]]


def test_bad_samples_are_named():
    with pytest.raises(ValueError, match=r"samples\[0\].first"):
        make_batch([Sample((1, 2, 3), 3)])
    with pytest.raises(ValueError, match=r"samples\[1\].pieces"):
        make_batch([Sample((1, 2, 3), 1), Sample((1, 2), 1, (Piece(2, ()),))])
    with pytest.raises(ValueError, match="live write"):
        Objective(tiny())(make_batch(memory_samples()))
