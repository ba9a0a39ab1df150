"""What the generic op tests cannot state: the selection rules against their formulas written out, ties, in-place
semantics, threads."""

from __future__ import annotations

import math
import os

import pytest
import torch

from memory3_kernels import Book, gather_dequantize, gather_memory, scatter_memory, select_tokens, vq_dequantize
from memory3_kernels._registry import OPS
from memory3_kernels.ops import _codec
from memory3_kernels.ops.select_tokens import weights

RULES = ("received", "exp", "causal")


def weights_by_formula(q, k, length, start, scale, rule):
    """w[h][j] in plain Python floats, straight from docs/ops/select_tokens.md; q [T, Hq, D], k [T, Hkv, D]."""
    rows = range(start, length)
    group = q.shape[1] // k.shape[1]
    result = []
    for head in range(k.shape[1]):
        weight = dict.fromkeys(rows, 0.0)
        for h in range(head * group, (head + 1) * group):
            for i in rows:
                seen = range(i + 1) if rule == "causal" else rows
                score = {j: scale * math.fsum((q[i, h].double() * k[j, head].double()).tolist()) for j in seen}
                total = 1.0 if rule == "exp" else sum(math.exp(s) for s in score.values())
                for j in rows:
                    if j in score:
                        weight[j] += math.exp(score[j]) / total
        result.append(weight)
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start, length", [(0, 9), (2, 9), (3, 5), (4, 4)])
def test_rules_are_their_formulas(rule, start, length):
    q, k = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8)
    lengths = torch.tensor([length], dtype=torch.int32)
    chosen = select_tokens(q, k, lengths, tokens=3, start=start, scale=0.35, rule=rule)
    for head, weight in enumerate(weights_by_formula(q[0], k[0], length, start, 0.35, rule)):
        best = sorted(sorted(weight), key=lambda j: -weight[j])[:3]
        assert chosen[0, head].tolist() == sorted(best) + [-1] * (3 - len(best))


def test_rules_differ():
    """One input, three answers: the rule argument is not decoration."""
    q, k = 3 * torch.randn(1, 24, 2, 8), torch.randn(1, 24, 1, 8)
    length = torch.tensor([24], dtype=torch.int32)
    answers = {tuple(select_tokens(q, k, length, tokens=6, scale=1.0, rule=rule).flatten().tolist()) for rule in RULES}
    assert len(answers) == 3


def test_default_is_the_papers_rule():
    q, k, length = torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8), torch.tensor([12, 7], dtype=torch.int32)
    wanted = select_tokens(q, k, length, tokens=4, start=0, scale=1.0, rule="received")
    assert torch.equal(select_tokens(q, k, length, tokens=4, scale=1.0), wanted)


@pytest.mark.parametrize("rule", ["received", "exp"])
def test_ties_go_to_the_lower_row(rule):
    q, k = torch.randn(1, 10, 2, 16), torch.randn(1, 1, 1, 16).expand(1, 10, 1, 16).contiguous()
    chosen = select_tokens(q, k, torch.tensor([10], dtype=torch.int32), tokens=4, start=1, scale=0.25, rule=rule)
    assert chosen.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("rule", ["received", "exp"])
def test_a_better_row_displaces_the_higher_of_equals(rule):
    q, k = torch.ones(1, 5, 1, 8), torch.tensor([0.1, 0.1, 0.0, 0.5, 0.4]).view(1, 5, 1, 1).expand(1, 5, 1, 8)
    length = torch.tensor([5], dtype=torch.int32)
    for tokens, wanted in ((3, [0, 3, 4]), (2, [3, 4]), (4, [0, 1, 3, 4])):
        chosen = select_tokens(q, k.contiguous(), length, tokens=tokens, scale=1.0, rule=rule)
        assert chosen.flatten().tolist() == wanted


def test_prefix_keys_matter_to_the_causal_rule_only():
    """A prefix row that draws all attention leaves less to share out; the other rules must not see it."""
    q, k = torch.rand(1, 16, 2, 8), torch.randn(1, 16, 1, 8)
    louder = k.clone()
    louder[:, :2] = 5.0
    length = torch.tensor([16], dtype=torch.int32)
    for rule in RULES:
        options = {"start": 2, "scale": 1.0, "rule": rule}
        a, b = (weights(q, x, length, **options) for x in (k, louder))
        assert torch.equal(a, b) == (rule != "causal")
        picks = [select_tokens(q, x, length, tokens=4, **options) for x in (k, louder)]
        assert rule == "causal" or torch.equal(*picks)


def test_large_scores_do_not_overflow():
    q, k = torch.full((1, 6, 1, 8), 30.0), torch.zeros(1, 6, 1, 8)
    k[0, 4], k[0, 1] = 30.0, 29.0  # scores of 7200 and 6960
    for rule in ("received", "exp"):
        chosen = select_tokens(q, k, torch.tensor([6], dtype=torch.int32), tokens=1, scale=1.0, rule=rule)
        assert chosen.item() == 4


def test_rows_of_nan_can_still_be_chosen():
    """Bad data gives valid rows, not addresses out of range."""
    q, k = torch.full((1, 5, 1, 8), torch.nan), torch.full((1, 5, 1, 8), torch.nan)
    for rule in RULES:
        chosen = select_tokens(q, k, torch.tensor([5], dtype=torch.int32), tokens=3, scale=1.0, rule=rule)
        assert chosen.flatten().tolist() == [0, 1, 2]


WRONG = {
    "missing": lambda index: index.index_fill(2, torch.tensor([7]), -1),
    "twice": lambda index: torch.cat([index[..., :1], index[..., :-1]], -1),
    "descending": lambda index: index.flip(2),
    "prefix row": lambda index: torch.cat([torch.zeros_like(index[..., :1]), index[..., 1:]], -1),
    "int64": lambda index: index.long(),
}


@pytest.mark.parametrize("wrong", [*WRONG, "worse row", "higher twin"])
def test_comparison_notices(wrong):
    """The comparison of selections is a judge of its own: it must refuse what is wrong."""
    op = OPS["select_tokens"]
    q, k = torch.randn(2, 40, 2, 16), torch.randn(2, 40, 1, 16)
    k[:, 20:] = k[:, :20]
    args, kwargs = (q, k, torch.full((2,), 40, dtype=torch.int32)), {"tokens": 8, "start": 1, "scale": 1.0}
    kwargs["rule"] = "received"
    index = op.reference(*args, **kwargs)
    op.compare((index,), (index,), args, kwargs, 1e-5)
    row = index[0, 0].tolist()
    if wrong == "worse row":
        spare = next(r for r in range(1, 40) if r not in row and (r + 20) % 40 not in row)
        bad = index.clone()
        bad[0, 0] = torch.tensor(sorted(row[1:] + [spare]))
    elif wrong == "higher twin":
        single = next((r for r in row if r < 20 and r + 20 not in row), None)
        if single is None:  # all twins are chosen in pairs: leave the lower one of a pair out, at K - 1
            kwargs["tokens"] = 7
            index = op.reference(*args, **kwargs)
            row = index[0, 0].tolist()
            single = next(r for r in row if r < 20 and r + 20 not in row)
        bad = index.clone()
        bad[0, 0] = torch.tensor(sorted({*row, single + 20} - {single}))
    else:
        bad = WRONG[wrong](index)
    with pytest.raises(AssertionError):
        op.compare((bad,), (index,), args, kwargs, 1e-5)


def test_a_row_chosen_twice_collects_both_gradients():
    k = torch.randn(1, 3, 1, 8, requires_grad=True)
    index = torch.tensor([[[1, 1, -1]]], dtype=torch.int32)
    gather_memory(k, k.detach(), index).backward(torch.ones(1, 2, 1, 3, 8))
    assert torch.equal(k.grad[0, :, 0, 0], torch.tensor([0.0, 2.0, 0.0]))


def test_a_bad_slot_writes_nothing():
    arena, records = torch.zeros(3, 8), torch.ones(2, 8)
    with pytest.raises(RuntimeError, match=r"slots\[1\]: expected -1..2, got 3"):
        scatter_memory(arena, records, torch.tensor([0, 3], dtype=torch.int32))
    assert not arena.any()


def test_scatter_counts_a_version():
    """Autograd must notice that a tensor it saved has changed."""
    arena, weight = torch.ones(3, 8), torch.ones(3, 8, requires_grad=True)
    product = arena * weight
    scatter_memory(arena, torch.zeros(1, 8), torch.tensor([1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_scatter_inside_inference_mode():
    with torch.inference_mode():
        arena = torch.zeros(2, 8)
        scatter_memory(arena, torch.ones(1, 8), torch.tensor([1], dtype=torch.int32))
        assert arena[1].all() and not arena[0].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_scatter_into_any_strides(transposed):
    records = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    arena = torch.full((4, 6, 3, 5, 4), -1.0)[:, 1].transpose(2, 3) if transposed else torch.full((4, 3, 4, 5), -1.0)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    scatter_memory(arena, records.transpose(1, 2).contiguous().transpose(1, 2), slots)
    assert torch.equal(arena[2], records[0]) and torch.equal(arena[0], records[1])
    assert (arena[1] == -1).all() and (arena[3] == -1).all()


def test_records_longer_than_one_piece():
    """A record of 300 KB, copied in pieces of 64 KiB; the slot's padding stays."""
    arena = torch.zeros(3, 75_000)
    view = arena[:, :74_900]
    records = torch.randn(2, 74_900)
    scatter_memory(view, records, torch.tensor([2, 0], dtype=torch.int32))
    assert torch.equal(view[2], records[0]) and torch.equal(view[0], records[1])
    assert not arena[1].any() and not arena[:, 74_900:].any()


def book(dim=32, half=False):
    draw = torch.Generator().manual_seed(5)
    return Book(*_codec.sample_tables(dim, 6, 4, 9, torch.float32, draw, half_tables=half))


def test_float64_result_is_the_references():
    codes = _codec.sample_codes((5, 7), torch.Generator().manual_seed(0))
    wide = vq_dequantize(codes, book(), torch.float64)
    assert wide.dtype is torch.float64
    torch.testing.assert_close(wide.float(), vq_dequantize(codes, book()), rtol=1e-5, atol=1e-5)


def test_codes_may_be_a_strided_view():
    codes = _codec.sample_codes((6, 4, 7), torch.Generator().manual_seed(0))
    for view in (codes[:, 1], codes[::2], codes.transpose(0, 1), codes[:, :3]):
        assert torch.equal(vq_dequantize(view, book()), vq_dequantize(view.contiguous(), book()))


def test_tables_may_be_strided_views():
    plain = book()
    wide = Book(*(torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]] for t in plain))
    codes = _codec.sample_codes((9, 7), torch.Generator().manual_seed(0))
    assert torch.equal(vq_dequantize(codes, wide), vq_dequantize(codes, plain))


def test_results_do_not_depend_on_threads():
    """Work is cut by thread count, sums are not: the same bits with one thread and with three."""
    if os.environ.get("M3_NATIVE", "1") == "0":
        pytest.skip("M3_NATIVE=0: this run covers the references")
    q, k = torch.randn(9, 40, 6, 16), torch.randn(9, 40, 2, 16)
    length = torch.tensor([40, 3, 0, 17, 40, 9, 40, 1, 25], dtype=torch.int32)
    codes = _codec.sample_codes((700, 7), torch.Generator().manual_seed(0))
    arena = _codec.sample_codes((40, 3, 64), torch.Generator().manual_seed(1))
    slots = torch.randint(-1, 40, (90,), dtype=torch.int32)
    same = torch.randint(0, 6, (50,), dtype=torch.int32)
    records = torch.randn(50, 9000)

    def results():
        target = torch.zeros(6, 9000)
        scatter_memory(target, records, same)
        chosen = [select_tokens(q, k, length, tokens=8, start=1, scale=0.25, rule=rule) for rule in RULES]
        decoded = vq_dequantize(codes, book()), gather_dequantize(arena, slots, book(), tokens=8)
        return (*chosen, gather_memory(k, k, chosen[0]), *decoded, target)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        three = results()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)
