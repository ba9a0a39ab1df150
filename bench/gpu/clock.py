"""Times of calls on a GPU: CUDA events around captured graphs, with the second-level cache flushed or warm.

A graph leaves Python and the launches' host side out; before each measured replay a kernel that writes twice the cache
keeps the GPU busy, so that the replay waits in the queue and not the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..timing import Summary

HOT_CALLS = 20  # in one graph, divided by; fewer where that would take longer than HOT_US
HOT_US = 2000
FEW, LONGEST_US = 5, 1_000_000  # rounds of a call that would take longer than that for all of them
SETTLE = 3  # calls before a capture: compilers, autotuning, allocations


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: operands from memory, operands as the caches have them."""

    cold: Summary
    hot: Summary
    captured: bool  # False: the call cannot be captured, and host time is in the figures


class Clock:
    """`cuda`: torch.cuda, or in tests something that behaves like it."""

    def __init__(self, cache_bytes: int, cuda=torch.cuda, device: str = "cuda"):
        self.cuda = cuda
        self.flushed = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        self.flushed.fill_(1)

    def measure(self, call: Callable[[], object], rounds: int, capture: bool = True) -> Times:
        for _ in range(SETTLE):
            call()
        self.cuda.synchronize()
        one = self.capture(call, 1) if capture else None
        cold = self.replays(one or call, min(rounds, FEW), cold=True)
        if rounds > FEW and rounds * Summary.of(cold).median < LONGEST_US:
            cold = self.replays(one or call, rounds, cold=True)
        count = max(1, min(HOT_CALLS, int(HOT_US / Summary.of(cold).median)))
        many = self.capture(call, count) if one is not None else None

        def in_turn() -> None:
            for _ in range(count):
                call()

        hot = [t / count for t in self.replays(many or in_turn, len(cold), cold=False)]
        return Times(Summary.of(cold), Summary.of(hot), one is not None)

    def capture(self, call: Callable[[], object], count: int) -> Callable[[], None] | None:
        """A replay of `count` calls, or None where a call synchronises or allocates what a graph cannot hold."""
        side = self.cuda.Stream()
        try:
            with self.cuda.stream(side):
                call()
            self.cuda.synchronize()
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph, stream=side):
                for _ in range(count):
                    call()
        except RuntimeError:
            self.cuda.synchronize()
            return None
        return graph.replay

    def replays(self, run: Callable[[], object], rounds: int, cold: bool) -> list[float]:
        """Microseconds of each of `rounds` runs, queued one behind the other; the first one more is thrown away."""
        pairs = []
        for _ in range(rounds + 1):
            if cold:
                self.flush()
            else:
                run()
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs[1:]]
