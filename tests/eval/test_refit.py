"""Refitted memories stand for more of what was left out than plain ones."""

from __future__ import annotations

import math

import torch

from memory3.eval.refit import MOST, mass_bias, refit_values

SCALE = 16**-0.5


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = (torch.randn(n, 16, generator=generator) for n in (40, 40, 200))
    weight = torch.softmax(SCALE * queries @ keys.T, 1).sum(0)
    kept = weight.topk(8).indices.sort().values
    return queries, keys, values, kept


def test_twins_weigh_twice():
    """Every key there k times, once kept: the bias is log k."""
    keys = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    queries = torch.randn(100, 16, generator=torch.Generator().manual_seed(2))
    bias = mass_bias(queries, keys.repeat(4, 1), keys, SCALE, steps=4000)
    torch.testing.assert_close(bias, torch.full((5,), math.log(4)), atol=0.02, rtol=0)


def test_mass_and_output_come_nearer():
    queries, keys, values, kept = problem()
    bias = mass_bias(queries, keys, keys[kept], SCALE)
    every, some = (SCALE * queries @ k.T for k in (keys, keys[kept]))
    plain, fitted = (torch.logsumexp(some + b, 1) - torch.logsumexp(every, 1) for b in (0, bias))
    assert fitted.abs().mean() < 0.3 * plain.abs().mean() and bias.abs().max() <= MOST

    wanted = torch.softmax(every, 1) @ values
    weights = torch.softmax(some + bias, 1)
    new = refit_values(queries, keys, values, keys[kept], values[kept], bias, SCALE)
    assert (weights @ new - wanted).norm() < 0.7 * (weights @ values[kept] - wanted).norm()


def test_nothing_left_out_changes_nothing():
    queries, keys, values, _ = problem()
    assert mass_bias(queries, keys, keys, SCALE).abs().max() < 1e-3
    new = refit_values(queries, keys, values, keys, values, torch.zeros(40), SCALE)
    torch.testing.assert_close(new, values, atol=1e-4, rtol=1e-4)


def test_padding_counts_for_nothing():
    """Two problems of different sizes at once, against each by itself."""
    queries, keys, values, kept = problem()
    few = (queries[:60], keys[:25], values[:25], torch.tensor([1, 4, 7, 9, 20]))
    wide = [torch.stack([x, torch.cat([y, 50 + torch.zeros(len(x) - len(y), 16)])]) for x, y in zip(
        (queries, keys, values, keys[kept], values[kept]), (*few[:3], keys[few[3]], values[few[3]]), strict=True
    )]  # fmt: skip
    sizes = {"asks": (200, 60), "there": (40, 25), "live": (8, 5)}
    masks = {k: torch.arange(a) < torch.tensor([[a], [b]]) for k, (a, b) in sizes.items()}
    bias = mass_bias(wide[0], wide[1], wide[3], SCALE, **masks)
    new = refit_values(*wide, bias, SCALE, **masks)
    for i, (q, k, v, chosen) in enumerate(((queries, keys, values, kept), few)):
        alone = mass_bias(q, k, k[chosen], SCALE)
        torch.testing.assert_close(bias[i, : len(chosen)], alone, atol=1e-4, rtol=1e-4)
        values_alone = refit_values(q, k, v, k[chosen], v[chosen], alone, SCALE)
        torch.testing.assert_close(new[i, : len(chosen)], values_alone, atol=1e-3, rtol=1e-3)
