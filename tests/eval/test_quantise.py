"""Quantisation in torch against FAISS: the same codes by the same books, and books of the same worth."""

from __future__ import annotations

import pytest
import torch

from memory3.bank.codec import train_codec
from memory3.bank.format import Layout
from memory3.eval.answer import Loaded
from memory3.eval.quantise import through, train
from memory3.memory import Memory

SHAPE = (24, 3, 2, 2, 8, 16)  # references, layers, planes, heads, tokens, dim
SPECS = ("Residual2x4,PQ4x4", "OPQ4_16,Residual2x5,PQ4x5")


@pytest.fixture(scope="module")
def kv():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 16, generator=generator)
    return torch.randn(SHAPE, generator=generator).pow(3) @ mixed


def error(kv, other):
    return float((kv - other).square().mean((0, 1, 3, 4, 5)).div(kv.square().mean((0, 1, 3, 4, 5))).mean())


@pytest.mark.filterwarnings("ignore:codec")
@pytest.mark.parametrize("spec", SPECS)
def test_as_faiss(kv, spec):
    codec = train_codec(spec, [Memory(one) for one in kv], seed=0)
    by_faiss = codec.decode(codec.encode(kv), Layout(3, 2, 8, 16, torch.float32))
    ours = through(codec, kv)
    same = (ours - by_faiss).abs().amax(-1) < 1e-4
    assert same.float().mean() > 0.999  # but for ties

    length = torch.tensor([8] * 20 + [5] * 4, dtype=torch.int32)
    bad = kv.clone()
    bad[20:, :, :, :, 5:] = 1e6  # behind a reference's last token: nothing to learn from
    books = train(spec, Loaded({i: i for i in range(24)}, bad, length), 10**6)
    assert books.spec == codec.spec
    assert error(kv, through(books, kv)) < 1.15 * error(kv, by_faiss)
