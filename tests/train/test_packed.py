"""One pack with the prefix inside: the same hidden rows as apart, and the loss of held sequences."""

from __future__ import annotations

import pytest
import torch
from model.common import TINY_MEMORY, tiny

from memory3.config import MemoryConfig
from memory3.memory import MemoryRead
from memory3.train.batch import Piece, Sample, make_batch
from memory3.train.config import LoRA
from memory3.train.lora import add_lora, computing
from memory3.train.objective import Objective
from memory3.train.packed import distance_to_base, pack
from memory3.train.resident import Resident

from .common import memory_samples, reference_tokens
from .test_lora import stirred


def plain(samples) -> list[Sample]:
    return [Sample(s.ids, s.first) for s in samples]


@pytest.mark.parametrize("prefix", [(1, 5, 6), ()])
def test_the_prefix_in_the_pack_is_the_prefix_apart(prefix):
    memory = MemoryConfig((0, 2), tokens=4, span=16, prefix_ids=prefix, context_bos_ids=(1,))
    net = tiny(memory=memory)
    batch = make_batch(memory_samples(memory=memory))
    objective = Objective(net, reference_tokens)
    kv, length = objective._memories(batch.reads)
    read = MemoryRead(kv, length, batch.slots, batch.cu_chunk)
    apart = net.hidden(batch.tokens, batch.cu, read, net.encode_prefix(prefix, memory.span))
    torch.testing.assert_close(objective.predicted(batch), apart.index_select(0, batch.rows), rtol=1e-3, atol=1e-4)
    packed = pack(batch, memory)
    assert packed.text == len(batch.tokens) and packed.max_k == max(batch.cu.diff().tolist()) + len(prefix)
    assert objective(packed).item() == objective(batch).item()


def test_with_and_without_memory_in_one_batch():
    net = tiny()
    objective = Objective(net, reference_tokens)
    with_memory, without = memory_samples(), plain(memory_samples(seed=1))
    nothing = [Sample(s.ids, s.first, (Piece(len(s.ids), ()),)) for s in without]  # memory mode that reads nothing
    apart = [objective(make_batch(s)).item() for s in (with_memory, without, nothing)]
    mixed = make_batch([with_memory[0], *without, nothing[0], with_memory[1], nothing[1]], mixed=True)
    assert objective(mixed).item() == pytest.approx(sum(apart), rel=1e-5)
    assert apart[1] != pytest.approx(apart[2], rel=1e-3)


def test_folded_weights_are_the_adapter():
    """The same loss and the same gradients of A and B as by peft."""
    net, batch = stirred(), make_batch(memory_samples())
    objective = Objective(net, reference_tokens)
    found = []
    for fold in (False, True):
        net.zero_grad()
        with computing(net, fold):
            loss = objective(batch)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}))
    (plain_loss, plain_grads), (loss, grads) = found
    assert loss == pytest.approx(plain_loss, rel=1e-5) and grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-3, atol=1e-4)
    assert all("_Folded" not in type(m).__name__ for m in net.modules())  # all modules are back in place


def test_held_text_pulls_towards_the_base_weights():
    samples = [s._replace(held=True) for s in plain(memory_samples())]
    fresh = Objective(add_lora(tiny(), LoRA(rank=3)))
    assert fresh(make_batch(samples)).item() == pytest.approx(0, abs=1e-4)
    net = stirred()
    objective = Objective(net, reference_tokens)
    held, asked = objective(make_batch(samples)), objective(make_batch(memory_samples()))
    assert held.item() > 0.1
    both = make_batch([*samples, *memory_samples()], mixed=True)
    assert objective(both).item() == pytest.approx((held + asked).item(), rel=1e-5)
    held.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    with pytest.raises(ValueError, match="adapter"):
        Objective(tiny())(make_batch(samples))


def test_distance_is_kullback_leibler():
    a, b = torch.randn(3, 7), torch.randn(3, 7)
    p = b.softmax(-1)
    expected = (p * (b.log_softmax(-1) - a.log_softmax(-1))).sum()
    torch.testing.assert_close(distance_to_base(a, b), expected)


def test_resident_memories_are_what_a_bank_gives():
    net = tiny()
    references = [reference_tokens(bytes([i])) for i in range(4)]
    halved = Resident.write(net, references, lambda kv: kv / 2)
    done: list[int] = []
    resident = Resident.write(net, references, progress=done.append)
    assert done[-1] == 4 and done == sorted(done)
    assert resident.coded is None and halved.coded == 4 and halved.kv.shape[0] == 8
    torch.testing.assert_close(halved.kv[4:], halved.kv[:4] / 2)
    samples = memory_samples()
    numbered = [s._replace(pieces=tuple(Piece(p.end, tuple(r[0] for r in p.reads)) for p in s.pieces)) for s in samples]
    expected = Objective(net, reference_tokens)(make_batch(samples)).item()
    objective = Objective(net, resident=resident)
    assert objective(objective.pack(make_batch(numbered))).item() == pytest.approx(expected, rel=1e-5)
    moved = [s._replace(pieces=tuple(Piece(p.end, tuple(r + 4 for r in p.reads)) for p in s.pieces)) for s in numbered]
    other = Objective(net, resident=halved)
    assert other(make_batch(moved)).item() != pytest.approx(expected, rel=1e-3)
    assert TINY_MEMORY.tokens == resident.kv.shape[4]
