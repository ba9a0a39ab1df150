"""A peer: its call, and how to see that it computed the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """`call` is timed; `result(call())` is the op's first output, checked before."""

    call: Callable[[], object]
    result: Callable[[object], Tensor]
    operands: tuple[Tensor, ...]  # what `call` reads: its size says when operands no longer fit a cache
