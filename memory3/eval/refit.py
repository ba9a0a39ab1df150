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


def mass_bias(
    queries: Tensor,
    keys: Tensor,
    kept: Tensor,
    scale: float,
    steps: int = 60,
    there: Tensor | None = None,
    asks: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Biases [..., K] that give the kept keys the attention mass of all: non-negative least squares, projected descent.

    queries [..., Q, D], keys [..., N, D], kept [..., K, D], any float dtype; computed in fp32. there [..., N], asks
    [..., Q] and live [..., K]: False where a row of keys, queries or kept is padding (whose bias means nothing).
    """
    queries, keys, kept = (x.float() for x in (queries, keys, kept))
    every, some = scale * queries @ keys.mT, scale * queries @ kept.mT
    number, few = keys.shape[-2], kept.shape[-2]
    if there is not None:
        every = every.masked_fill(~there[..., None, :], -torch.inf)
        number = there.sum(-1)[..., None, None]
    top = every.amax(-1, keepdim=True)  # rows may be scaled freely: relative errors of the mass count
    a = (some - top).exp() / (every - top).exp().sum(-1, keepdim=True)
    if asks is not None:
        a = a.masked_fill(~asks[..., :, None], 0)
    if live is not None:
        a = a.masked_fill(~live[..., None, :], 0)
        few = live.sum(-1)[..., None, None].clamp_min(1)
    right = a.sum(-2)[..., None]
    w = torch.ones_like(right) * number / few
    gram = a.mT @ a
    step = 1 / torch.linalg.eigvalsh(gram)[..., -1:, None].clamp_min(1e-12)
    for _ in range(steps):
        w = (w - step * (gram @ w - right)).clamp_min(0)
    return w[..., 0].clamp_min(1e-6).log().clamp(-MOST, MOST)


def refit_values(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    kept_values: Tensor,
    bias: Tensor,
    scale: float,
    there: Tensor | None = None,
    asks: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Values [..., K, D] with which the kept keys give the output of all, in the mean over the queries; ridge RIDGE.

    there, asks, live: as for mass_bias.
    """
    queries, keys, values, kept, old = (x.float() for x in (queries, keys, values, kept, kept_values))
    every, some = scale * queries @ keys.mT, scale * queries @ kept.mT + bias[..., None, :]
    if there is not None:
        every = every.masked_fill(~there[..., None, :], -torch.inf)
    if live is not None:
        some = some.masked_fill(~live[..., None, :], -torch.inf)
    wanted, a = torch.softmax(every, -1) @ values, torch.softmax(some, -1)
    if asks is not None:
        wanted, a = (x.masked_fill(~asks[..., :, None], 0) for x in (wanted, a))
    gram = a.mT @ a
    few = gram.shape[-1] if live is None else live.sum(-1).clamp_min(1)
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / few
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], device=gram.device)
    return old + torch.linalg.solve(gram, a.mT @ (wanted - a @ old))
