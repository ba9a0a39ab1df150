"""The key-value cache of a batch, its constant prefix, and what happens when it is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memory3_kernels import pages

from ..config import ModelConfig
from .rope import Rope


class ContextFull(RuntimeError):
    """A sequence has no row or no position left for its next tokens."""


class Prefix(NamedTuple):
    """Key-values of the constant prefix: k, v [L, m, Hkv, D] at positions 0..m-1; `span` free positions follow."""

    k: Tensor
    v: Tensor
    span: int


class KVCache:
    """Keys (after RoPE) and values of B sequences: k, v [L, B, N, Hkv, D]; rows [0, length) are in use.

    Plain mode: row r has position r. Memory mode (after `start(prefix)`): the first m rows are the prefix at
    positions 0..m-1, row r >= m has position r + span; the span in between is where memories live.
    A sequence may use `limit` rows: its capacity, and no position at or above max_context.

    overflow "error": more tokens than fit raise ContextFull, before anything is written.
    overflow "slide": the oldest rows are dropped, at least `slide` of them at a time (default a quarter of the
    limit), but never the prefix nor the `pinned` rows after it (the context BOS, which models use as a sink). The
    keys that stay are rotated back by as many positions: positions stay gapless, below max_context. What dropped
    rows contributed to the rows that stay remains in them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        overflow: str = "error",
        slide: int | None = None,
        pinned: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 0 or capacity <= 0:
            raise ValueError(f"batch must be >= 0 and capacity > 0, got batch={batch} and capacity={capacity}")
        if overflow not in ("error", "slide"):
            raise ValueError(f'overflow must be "error" or "slide", got {overflow!r}')
        if slide is not None and slide <= 0:
            raise ValueError(f"slide must be a positive number of rows, got {slide}")
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        on_cpu = torch.device(device).type == "cpu"
        self.k, self.v = (
            pages.zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.config = config
        self.overflow = overflow
        self.lengths = [0] * batch
        self.prefix_len = 0
        self.span = 0
        self._slide = slide
        self._pinned = pinned
        self._rope = Rope(config)

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def limit(self) -> int:
        """Most rows a sequence may use, the prefix included."""
        return min(self.capacity, self.config.max_context - self.span)

    @property
    def length(self) -> Tensor:
        """int32 [B]: rows in use, the prefix included."""
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.k.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        row = 2 * self.k.shape[0] * self.k.shape[3] * self.k.shape[4] * self.k.element_size()
        return sum(self.lengths) * row

    def start(self, prefix: Prefix) -> KVCache:
        """Empty the cache and enter memory mode with `prefix` in the first rows of every sequence."""
        m = prefix.k.shape[1]
        if m >= min(self.capacity, self.config.max_context - prefix.span):
            raise ContextFull(
                f"the prefix of {m} tokens and span of {prefix.span} leave no room in a cache of {self.capacity} "
                f"rows and {self.config.max_context} positions; make the cache larger"
            )
        self.k[:, :, :m] = prefix.k.unsqueeze(1)
        self.v[:, :, :m] = prefix.v.unsqueeze(1)
        self.prefix_len, self.span = m, prefix.span
        self.lengths = [m] * self.batch
        return self

    def reset(self) -> KVCache:
        """Forget all rows but the prefix."""
        self.lengths = [self.prefix_len] * self.batch
        return self

    def keep(self, sequences: Sequence[int]) -> KVCache:
        """A new cache that holds copies of these sequences only, in this order (for batches that shrink)."""
        index = torch.as_tensor(list(sequences), dtype=torch.int64, device=self.k.device)
        new = object.__new__(KVCache)
        new.__dict__.update(self.__dict__)
        new.k, new.v = self.k.index_select(1, index), self.v.index_select(1, index)
        new.lengths = [self.lengths[i] for i in sequences]
        return new

    def make_room(self, new: Sequence[int]) -> None:
        """Make sure that sequence b can take new[b] more rows; slides where allowed, else raises ContextFull."""
        if len(new) != self.batch:
            raise ValueError(f"expected tokens for the cache's {self.batch} sequences, got {len(new)}")
        limit = self.limit
        for b, count in enumerate(new):
            excess = self.lengths[b] + count - limit
            if excess <= 0:
                continue
            droppable = max(0, self.lengths[b] - self.prefix_len - self._pinned)
            if self.overflow == "error" or excess > droppable:
                hint = "use a larger cache, a shorter text, or overflow='slide'"
                if self.overflow == "slide":
                    hint = "feed the text in smaller pieces or use a larger cache"
                raise ContextFull(
                    f"sequence {b} holds {self.lengths[b]} rows and needs {count} more, but at most {limit} fit "
                    f"(capacity {self.capacity}, max_context {self.config.max_context}, span {self.span}); {hint}"
                )
            wanted = self._slide if self._slide is not None else max(1, limit // 4)
            self.drop_oldest(b, min(droppable, max(excess, wanted)))

    def drop_oldest(self, sequence: int, rows: int) -> None:
        """Drop the oldest `rows` rows after the prefix and the pinned rows; rotate later keys to close the gap."""
        m, end = self.prefix_len + self._pinned, self.lengths[sequence]
        if not 0 <= rows <= max(0, end - m):
            raise ValueError(f"rows must be in 0..{max(0, end - m)} (rows that may go), got {rows}")
        if rows == 0:
            return
        keys = self._rope.shift(self.k[:, sequence, m + rows : end], -rows)
        self.k[:, sequence, m : end - rows] = keys
        self.v[:, sequence, m : end - rows] = self.v[:, sequence, m + rows : end].clone()
        self.lengths[sequence] = end - rows

    def positions(self, new: Sequence[int]) -> list[int]:
        """Positions of the next new[b] rows of each sequence, packed."""
        out: list[int] = []
        for length, count in zip(self.lengths, new, strict=True):
            out.extend(range(length + self.span, length + self.span + count))
        return out
