"""Choosing a memory's rows in plain torch: what select_tokens is compared with.

The heads of a KV head lie side by side and the scale is in the queries beforehand, outside the timed call; buffers for
scores and weights are kept, since fresh pages would cost as much as the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .peer import Peer


def matmul_softmax_topk(
    q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int, scale: float, rule: str
) -> Peer:
    """select_tokens' peer: a batched matmul of grouped heads, softmax, sum over queries, topk, all in q's dtype.

    Raises:
        ValueError: a rule other than "received", a prefix, or references of several lengths (torch would need a mask).
    """
    n, rows, heads, dim = q.shape
    if rule != "received" or start or not n or set(length.tolist()) != {rows} or tokens > rows:
        raise ValueError("matmul_softmax_topk: expected the rule received, no prefix and full references")
    groups = k.shape[2]
    vectors = (q * scale).view(n, rows, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    queries = vectors.reshape(n * groups, -1, dim)
    keys = k.transpose(1, 2).reshape(n * groups, rows, dim)
    score = queries.new_empty(n * groups, queries.shape[1], rows)
    weight = torch.empty_like(score)

    def call() -> Tensor:
        torch.bmm(queries, keys.transpose(1, 2), out=score)
        torch.softmax(score, -1, out=weight)
        return weight.sum(1).topk(tokens).indices.sort().values

    return Peer(call, lambda index: index.view(n, groups, tokens).to(torch.int32), (queries, keys))
