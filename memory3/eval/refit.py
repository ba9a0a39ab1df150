"""Making few tokens stand for many: a bias and new values per kept token, fitted in closed form after selection.

After Attention Matching (arXiv 2602.16284). Per layer and record head, with training queries Q of the reference itself
(its own query vectors at every position, rotated to a position behind the reference), the N tokens' keys and values,
and the K kept ones:

    bias    b >= 0 weights w = exp(b): least squares  exp(Q k_kept^T) w  ~  row sums of exp(Q k^T)   (mass of the whole)
    value   least squares  softmax(Q k_kept^T + b) V'  ~  softmax(Q k^T) V, with a ridge towards the old values
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.1
MOST = 3.0  # of a bias, natural log: one token may stand for at most e^3 = 20


def mass_bias(queries: Tensor, keys: Tensor, kept: Tensor, scale: float, steps: int = 60) -> Tensor:
    """Biases [K] that give the kept keys the attention mass of all: non-negative least squares, projected descent.

    queries [Q, D], keys [N, D], kept [K, D], any float dtype; computed in fp32.
    """
    queries, keys, kept = (x.float() for x in (queries, keys, kept))
    every, some = scale * queries @ keys.T, scale * queries @ kept.T
    top = every.amax(1, keepdim=True)  # rows may be scaled freely: relative errors of the mass count
    target = (every - top).exp().sum(1)
    a = (some - top).exp() / target[:, None]
    w = torch.full((kept.shape[0],), len(keys) / len(kept))
    gram, right = a.T @ a, a.sum(0)
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12)
    for _ in range(steps):
        w = (w - step * (gram @ w - right)).clamp_min(0)
    return w.clamp_min(1e-6).log().clamp(-MOST, MOST)


def refit_values(
    queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor, kept_values: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Values [K, D] with which the kept keys give the output of all, in the mean over the queries; ridge RIDGE."""
    queries, keys, values, kept, old = (x.float() for x in (queries, keys, values, kept, kept_values))
    wanted = torch.softmax(scale * queries @ keys.T, 1) @ values
    a = torch.softmax(scale * queries @ kept.T + bias, 1)
    gram = a.T @ a
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(kept))
    return old + torch.linalg.solve(gram + ridge, a.T @ (wanted - a @ old))
