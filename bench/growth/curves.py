"""Curves over context, batch and memories: one op, and the model around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from memory3_kernels import memory_decode

from ..timing import Summary

HEADS, KV_HEADS, DIM, KEPT = 9, 3, 64, 32  # SmolLM2-135M, and the tokens it keeps of a reference
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MEMORIES = (1, 2, 4, 8, 16, 32)
PLAIN = {"context": 1024, "batch": 1, "memories": 5}  # what stays while one of them grows
AXES = {"context": CONTEXTS, "batch": BATCHES, "memories": MEMORIES}
MOST_CACHE = 2 << 30  # bytes of key-values that a batch may hold


def points(axis: str, longest: int = CONTEXTS[-1]) -> Iterator[dict[str, int]]:
    """Shapes along an axis; the last context is the longest one that is possible, should that fall between two."""
    for x in AXES[axis]:
        shape = PLAIN | {axis: x}
        if shape["context"] <= longest:
            yield shape
        elif shape["context"] < 2 * longest:
            yield shape | {"context": longest}


def ops(args, folder: Path, have: set, end: float) -> Iterator[dict[str, Any]]:
    """memory_decode: milliseconds of one layer's call."""
    for axis in AXES:
        for shape in points(axis):
            if ("ops", f"memory_decode over {axis}", shape[axis]) in have or time.monotonic() > end:
                continue
            call = decode_call(**shape)
            yield {
                "curve": f"memory_decode over {axis}", "axis": axis, "x": shape[axis], "shape": shape,
                "values": {"ms": median_ms(call, args.runs)},
            }  # fmt: skip


def decode_call(context: int, batch: int, memories: int):
    """A call on random operands, bfloat16; every sequence has memories of its own."""
    make = torch.Generator().manual_seed(context * 131 + batch * 17 + memories)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).bfloat16()

    q = random(batch, HEADS, DIM)
    k, v = random(batch, context, KV_HEADS, DIM), random(batch, context, KV_HEADS, DIM)
    records = [random(batch * memories, KV_HEADS, KEPT, DIM) for _ in range(2)]
    slots = torch.arange(batch * memories, dtype=torch.int32).view(batch, memories)
    length = torch.full((batch * memories,), KEPT, dtype=torch.int32)
    filled = torch.full((batch,), context, dtype=torch.int32)
    cu = torch.arange(batch + 1, dtype=torch.int32)
    shape = {"scale": DIM**-0.5, "max_q": 1, "max_kv": context}
    return lambda: memory_decode(q, k, v, filled, None, cu, *records, slots, length, **shape)


def engine(args, folder: Path, have: set, end: float) -> Iterator[dict[str, Any]]:
    """SmolLM2-135M: milliseconds of a decode step, and of one prompt token."""
    from memory3 import PRESETS, load_model

    model = None
    preset = PRESETS["smollm2-135m"]
    longest = longest_context(preset.memory, preset.model, args.runs)
    for axis in AXES:
        for shape in points(axis, longest):
            if ("engine", f"SmolLM2-135M over {axis}", shape[axis]) in have or time.monotonic() > end:
                continue
            model = model or load_model("smollm2-135m")
            if (values := model_values(model, args.runs, **shape)) is not None:
                yield {
                    "curve": f"SmolLM2-135M over {axis}", "axis": axis, "x": shape[axis], "shape": shape,
                    "values": values,
                }  # fmt: skip


def longest_context(memory, config, runs: int) -> int:
    """That leaves positions for memories and the steps that are timed."""
    return config.max_context - memory.span - memory.prefix_len - (runs + 1)


def model_values(model, runs: int, context: int, batch: int, memories: int) -> dict[str, float] | None:
    """None where the context or the batch does not fit. The cache is filled with the keys of one prompt."""
    from memory3.memory import MemoryRead

    memory, config = model.memory, model.config
    steps, prefix = runs + 1, memory.prefix_len
    rows = prefix + context + steps
    row = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.dtype.itemsize
    if context > longest_context(memory, config, runs) or batch * rows * row > MOST_CACHE:
        return None
    make = torch.Generator().manual_seed(7)
    tokens = torch.randint(10, config.vocab_size, (context,), generator=make)
    shape = (batch * memories, *memory.record_shape(config))
    read = MemoryRead(
        torch.randn(shape, generator=make).to(model.dtype),
        torch.full((batch * memories,), memory.tokens, dtype=torch.int32),
        torch.arange(batch * memories, dtype=torch.int32).view(batch, memories),
    )
    cache = model.new_cache(batch, rows)
    one = model.new_cache(1, rows)
    begin = time.perf_counter()
    model.net.prefill(tokens, torch.tensor([0, context], dtype=torch.int32), one)
    prefill = time.perf_counter() - begin
    cache.k.copy_(one.k.expand_as(cache.k))
    cache.v.copy_(one.v.expand_as(cache.v))
    cache.lengths = [prefix + context] * batch
    next_token = torch.full((batch,), 5)
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        model.net.decode(next_token, cache, read)
        seconds.append(time.perf_counter() - begin)
    return {"step ms": Summary.of(seconds[1:]).median * 1e3, "prompt ms": prefill * 1e3}


def median_ms(call, runs: int, long_enough: float = 2e-3) -> float:
    with torch.no_grad():
        begin = time.perf_counter()
        call()
        call()
        count = max(1, int(long_enough / max((time.perf_counter() - begin) / 2, 1e-7)))
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            for _ in range(count):
                call()
            seconds.append((time.perf_counter() - begin) / count)
    return Summary.of(seconds).median * 1e3
