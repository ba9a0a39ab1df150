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
