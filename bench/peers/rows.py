"""Choosing rows in plain torch: what gather_memory is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .peer import Peer


def two_index_selects(k: Tensor, v: Tensor, index: Tensor) -> Peer:
    """gather_memory's peer: one `index_select` of rows for keys and one for values, written into the record.

    Row numbers are made flat beforehand, outside the timed call, and so is the room for the result.

    Raises:
        ValueError: a row that is -1 (torch has no row of zeros to choose).
    """
    if not index.numel() or bool((index < 0).any()):
        raise ValueError("two_index_selects: expected rows from 0 on, got -1 or none")
    n, rows, heads, dim = k.shape
    first = torch.arange(n).view(n, 1, 1) * rows * heads + torch.arange(heads).view(1, heads, 1)
    flat = (first + index.long() * heads).flatten()
    keys, values = (x.contiguous().view(-1, dim) for x in (k, v))
    out = k.new_empty((2, len(flat), dim))

    def call() -> Tensor:
        torch.index_select(keys, 0, flat, out=out[0])
        torch.index_select(values, 0, flat, out=out[1])
        return out

    return Peer(call, lambda found: found.view(2, n, heads, -1, dim).transpose(0, 1), (keys, values, flat))
