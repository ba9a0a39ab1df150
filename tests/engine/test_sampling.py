"""Sampling against definitions written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.sampling import Sampling, filtered, sample


def kept(logits, sampling):
    """Probabilities by the definitions, one token at a time: {token: probability}."""
    scaled = [x / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(math.exp(scaled[i] - scaled[order[0]]) for i in order)
    share = {i: math.exp(scaled[i] - scaled[order[0]]) / total for i in order}
    chosen, mass = {}, 0.0
    for i in order:
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
        chosen[i] = share[i]
        mass += share[i]
    total = sum(chosen.values())
    return {i: p / total for i, p in chosen.items()}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.floats(0.1, 5), st.integers(0, 14), st.floats(0.05, 1.0),
)  # fmt: skip
def test_filters_equal_the_definitions(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    want = kept([x / 7 for x in logits], sampling)
    got = filtered(torch.tensor([[x / 7 for x in logits]]), sampling).softmax(-1)[0]
    have = {i: float(p) for i, p in enumerate(got) if p > 0}
    if have.keys() == want.keys():
        assert all(have[i] == pytest.approx(want[i], rel=1e-4) for i in want)
    else:  # only the token at the very edge of top_p may differ, by rounding, or several that rounding hides
        smaller, larger = sorted((have, want), key=len)
        edge = [p for i, p in larger.items() if i not in smaller]
        assert set(smaller) < set(larger) and (len(edge) == 1 or sum(edge) < 1e-6)
        edge = sum(sorted((p for p in larger.values()), reverse=True)[:-1])
        assert edge == pytest.approx(top_p, abs=1e-4)


def test_frequencies_follow_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    sampling = Sampling(0.7, top_k=4, top_p=0.95, seed=3)
    generators = sampling.generators(1)
    draws = torch.tensor([int(sample(logits, sampling, generators)) for _ in range(4000)])
    share = filtered(logits, sampling).softmax(-1)[0]
    counts = torch.bincount(draws, minlength=5) / 4000
    assert (counts - share).abs().max() < 0.03
    assert counts[share == 0].sum() == 0


def test_temperature_zero_is_argmax():
    logits = torch.randn(5, 30)
    greedy = Sampling()
    assert torch.equal(sample(logits, greedy, greedy.generators(5)), logits.argmax(-1))
    tiny = Sampling(1e-30, seed=0)
    assert torch.equal(sample(logits, tiny, tiny.generators(5)), logits.argmax(-1))
    one = Sampling(1.0, top_k=1, seed=0)
    assert torch.equal(sample(logits, one, one.generators(5)), logits.argmax(-1))


def test_of_equally_likely_tokens_the_first():
    assert sample(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), Sampling(), []).tolist() == [1, 0]


def test_seeds():
    logits = torch.zeros(3, 10_000)

    def draw(seed, count=3):
        sampling = Sampling(1.0, seed=seed)
        return sample(logits[:count], sampling, sampling.generators(count)).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[1] == draw(2)[0], "sequence b draws from seed + b"
    assert draw(None) != draw(None), "no seed: not the same again"
    assert len(set(draw(1))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0"),
        ({"top_p": 0.0}, "top_p: expected a share"),
        ({"top_p": 1.1}, "top_p: expected a share"),
        ({"top_k": -1}, "top_k: expected 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
