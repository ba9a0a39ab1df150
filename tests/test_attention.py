"""Properties of the attention ops that single calls against a reference do not show."""

from __future__ import annotations

import os

import pytest
import torch

import memory3_kernels as m3
from memory3_kernels._backends import use_backend
from memory3_kernels.ops._attention_cases import Spec, attention_sample, coded_sample, decode_sample
from memory3_kernels.testing.compare import assert_close

BACKENDS = ["reference"] if os.environ.get("M3_NATIVE") == "0" else ["native", "reference"]
SPEC = Spec(heads=(6, 2), dim=32, sequences=((70, 90), (5, 5)), chunk=32, refs=3, tokens=6, slots=5,
            lengths=(6, 0, 3, 6, 1), bias="normal")  # fmt: skip
# Records of more than one block of keys, their slots in ascending order.
LONG = Spec(heads=(6, 2), dim=32, sequences=((70, 90), (5, 5)), chunk=32, refs=4, tokens=40, slots=4,
            slot_rows=((0, 1, 2, 3),) * 4, lengths=(40, 33, 40, 40), bias="normal")  # fmt: skip
# Eight KV heads side by side, read together by one thread and in parts by several; odd numbers of keys.
WIDE = Spec(heads=(32, 8), dim=128, sequences=((1, 151), (1, 70), (2, 64)), refs=2, tokens=5, slots=4)
DECODE = Spec(heads=(6, 2), dim=32, sequences=((1, 150), (4, 70), (1, 0)), refs=3, tokens=6, slots=5, arena=True)


def sample(make, dtype=torch.float32, seed=0):
    return make(dtype, torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_memory_and_context_merge_to_the_whole():
    """One softmax over both parts is the merge of a softmax over each."""
    args, kwargs = sample(attention_sample(SPEC))
    out, lse, mass = m3.memory_attention(*args, **kwargs)
    only_memory = list(args)
    only_memory[1] = only_memory[2] = None
    no_memory = list(args)
    no_memory[8] = torch.full_like(args[8], -1)
    a, lse_a, mass_a = m3.memory_attention(*only_memory, **kwargs)
    b, lse_b, mass_b = m3.memory_attention(*no_memory, **kwargs)
    merged, merged_lse = m3.merge_attention_states(a, lse_a, b, lse_b)
    assert_close(merged, out.double(), 1e-6)
    assert_close(merged_lse, lse.double(), 1e-6)
    assert_close(mass_a * torch.exp(lse_a - lse).unsqueeze(-1), mass.double(), 1e-5)
    assert mass_b.count_nonzero() == 0


def test_decode_continues_prefill():
    """The last row of a sequence is the same as prefill and as one decoded token."""
    args, kwargs = sample(attention_sample(SPEC))
    q, k, v, cu_q, cu_k, _, mem_k, mem_v, mem_slot, mem_len, bias, _ = args
    out, lse, mass = m3.memory_attention(*args, **kwargs)
    last, end = int(cu_q[1]) - 1, int(cu_k[1])
    got = m3.memory_decode(
        q[last : last + 1], k[None, :end], v[None, :end], torch.tensor([end], dtype=torch.int32), None,
        torch.tensor([0, 1], dtype=torch.int32), mem_k, mem_v, mem_slot[2:3], mem_len, bias,
        scale=kwargs["scale"], max_q=1, max_kv=end,
    )  # fmt: skip
    for a, e in zip(got, (out, lse, mass), strict=True):
        assert_close(a, e[last : last + 1].double(), 1e-5)


@pytest.mark.parametrize("which", ["context", "records"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_outgrow_earlier_ones(dtype, which):
    """Every block of keys dwarfs what was summed before it, mass included; some rows stay as they were."""
    args, kwargs = sample(attention_sample(LONG), dtype)
    at = {"context": 1, "records": 6}[which]
    grown = torch.linspace(1, 30, args[at].shape[0]).reshape(-1, *[1] * (args[at].dim() - 1))  # by key, by slot
    args = (*args[:at], (args[at] * grown).to(dtype), *args[at + 1 :])
    got = m3.memory_attention(*args, **kwargs)
    with use_backend("reference"):
        expected = m3.memory_attention(
            *[a.double() if a is not None and a.is_floating_point() else a for a in args], **kwargs
        )
    for a, e in zip(got, expected, strict=True):
        assert_close(a, e.double(), 1e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_equals_dense_on_decoded_records(dtype):
    args, kwargs = sample(coded_sample(DECODE), dtype)
    k_book, v_book = m3.Book(*args[12:15]), m3.Book(*args[15:18])
    tokens = kwargs["tokens"]
    coded = m3.memory_decode_coded(*args[:12], k_book=k_book, v_book=v_book, **kwargs)
    every = torch.arange(args[6].shape[0], dtype=torch.int32)
    mem_k = m3.gather_dequantize(args[6], every, k_book, tokens=tokens, dtype=torch.float32)
    mem_v = m3.gather_dequantize(args[7], every, v_book, tokens=tokens, dtype=torch.float32)
    wide = [a.float() if a is not None and a.is_floating_point() else a for a in args[:6]]
    dense = m3.memory_decode(*wide, mem_k, mem_v, *args[8:12], **{n: x for n, x in kwargs.items() if n != "tokens"})
    for a, e in zip(coded, dense, strict=True):
        assert_close(a, e.double(), 1e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("make, op", [(attention_sample(SPEC), m3.memory_attention),
                                      (decode_sample(DECODE), m3.memory_decode),
                                      (decode_sample(WIDE), m3.memory_decode)])  # fmt: skip
def test_results_do_not_depend_on_the_thread_count(threads, make, op):
    args, kwargs = sample(make, torch.bfloat16)
    threads(1)
    one = op(*args, **kwargs)
    threads(3)
    for a, b in zip(one, op(*args, **kwargs), strict=True):
        assert torch.equal(a, b)


def gradients(args, kwargs, positions, grads):
    args = [a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args)]
    out, lse, _ = m3.memory_attention(*args, **kwargs)
    return torch.autograd.grad([out, lse], [args[i] for i in positions], grads)


def test_gradients_do_not_depend_on_the_thread_count(threads):
    args, kwargs = sample(attention_sample(SPEC))
    grads = torch.randn(args[0].shape), torch.randn(args[0].shape[:2])
    threads(1)
    one = gradients(args, kwargs, (0, 1, 2, 6, 7, 10), grads)
    threads(3)
    for a, b in zip(one, gradients(args, kwargs, (0, 1, 2, 6, 7, 10), grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_rows_that_see_nothing(backend):
    """Their lse is -inf; whatever gradient comes in, nothing of it, NaN least of all, comes out."""
    spec = Spec(context=False, slot_rows=((-1, -1), (0, 1), (1, 1)))
    args, kwargs = sample(attention_sample(spec))
    out, lse, _ = m3.memory_attention(*args, **kwargs)
    grad_out, grad_lse = torch.randn(out.shape), torch.randn(lse.shape)
    clean = [g.clone() for g in (grad_out, grad_lse)]
    grad_out[:4], grad_lse[:4] = torch.nan, torch.inf
    clean[0][:4], clean[1][:4] = 0, 0
    with m3.use_backend(backend):
        got = m3.memory_attention_backward(grad_out, grad_lse, out, lse, *args, **kwargs)
        want = m3.memory_attention_backward(*clean, out, lse, *args, **kwargs)
    assert got[0][:4].count_nonzero() == 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert want[3][0].count_nonzero() > 0


def test_mass_has_no_gradient():
    args, kwargs = sample(attention_sample(SPEC))
    args = [args[0].requires_grad_(), *args[1:]]
    assert [t.requires_grad for t in m3.memory_attention(*args, **kwargs)] == [True, True, False]


def test_float64_runs_on_the_reference():
    args, kwargs = sample(attention_sample(SPEC), torch.float64)
    out, lse, mass = m3.memory_attention(*args, **kwargs)
    assert (out.dtype, lse.dtype, mass.dtype) == (torch.float64,) * 3
