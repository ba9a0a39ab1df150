"""Calls of every op at the shapes that predictions and measurements are made for: the paper's model and Llama-3-8B.

`device="meta"` makes the index tensors real and everything else a shape without storage: costs of any size, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COARSE_BITS, FINE_PARTS, FINE_BITS = 14, 8, 10  # the paper's code: 14 bytes per vector


@dataclass(frozen=True)
class Shape:
    """A model at work: `batch` sequences with `context` tokens, each reading `refs` records of `tokens` tokens."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    context: int
    batch: int = 32
    refs: int = 5
    tokens: int = 8
    span: int = 128  # tokens of a reference, from which select_tokens chooses
    chunk: int = 64  # rows that share their records


SHAPES = {
    s.name: s
    for s in (Shape("paper", 40, 8, 80, context=256), Shape("llama-3-8b", 32, 8, 128, context=4096))
}  # fmt: skip


class Maker:
    """Tensors for calls: normal values on `device`, indices on it or, for meta, on the CPU."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.index_device = "cpu" if device == "meta" else device

    def values(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, dtype=dtype or self.dtype, device=self.device)

    def bytes(self, *size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)

    def index(self, values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.index_device)

    def steps(self, count: int, by: int) -> Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=self.index_device) * by

    def book(self) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.shape.dim
        coarse = self.values(2, 1 << COARSE_BITS, dim // 2, dtype=torch.float16)
        fine = self.values(FINE_PARTS, 1 << FINE_BITS, dim // FINE_PARTS, dtype=torch.float16)
        rot = self.values(dim, dim, dtype=torch.float32)
        return coarse, fine, rot if self.device == "meta" else torch.linalg.qr(rot).Q.contiguous()

    def slots(self, readers: int) -> Tensor:
        """Each reader has records of its own: nothing is read twice."""
        return torch.arange(readers * self.shape.refs, dtype=torch.int32, device=self.index_device).view(readers, -1)

    def records(self, readers: int) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        s, count = self.shape, readers * self.shape.refs
        sides = [self.values(count, s.kv_heads, s.tokens, s.dim) for _ in range(2)]
        return *sides, self.slots(readers), self.index([s.tokens] * count), None, None

    def cache(self) -> tuple[Tensor, Tensor, Tensor, None]:
        s = self.shape
        sides = [self.values(s.batch, s.context, s.kv_heads, s.dim) for _ in range(2)]
        return *sides, self.index([s.context] * s.batch), None


Call = tuple[tuple, dict]
CODE = (2 * COARSE_BITS + 7) // 8 + (FINE_PARTS * FINE_BITS + 7) // 8


def memory_decode(m: Maker) -> Call:
    s = m.shape
    args = (m.values(s.batch, s.heads, s.dim), *m.cache(), m.steps(s.batch, 1), *m.records(s.batch))
    return args, {"scale": s.dim**-0.5, "max_q": 1, "max_kv": s.context}


def memory_decode_coded(m: Maker) -> Call:
    (q, *cache, cu_q, mem_k, _, slot, length, _, _), kwargs = memory_decode(m)
    padded = (m.shape.tokens * CODE + 15) // 16 * 16
    codes = [m.bytes(mem_k.shape[0], mem_k.shape[1], padded) for _ in range(2)]
    books = (*m.book(), *m.book())
    return (q, *cache, cu_q, *codes, slot, length, None, None, *books), {"tokens": m.shape.tokens, **kwargs}


def memory_attention(m: Maker) -> Call:
    s = m.shape
    rows = s.batch * s.context
    chunks = rows // s.chunk
    q, (k, v) = m.values(rows, s.heads, s.dim), (m.values(rows, s.kv_heads, s.dim) for _ in range(2))
    ends = m.steps(s.batch, s.context)
    args = (q, k, v, ends, ends.clone(), m.steps(chunks, s.chunk), *m.records(chunks))
    return args, {"scale": s.dim**-0.5, "max_q": s.context, "max_k": s.context, "max_chunk": s.chunk}


def memory_attention_backward(m: Maker) -> Call:
    args, kwargs = memory_attention(m)
    rows, heads, dim = args[0].shape
    grads = m.values(rows, heads, dim), m.values(rows, heads, dtype=torch.float32)
    if m.device == "meta":
        out, lse = m.values(rows, heads, dim), m.values(rows, heads, dtype=torch.float32)
    else:
        out, lse, _ = torch.ops.memory3.memory_attention(*args, **kwargs)
    return (*grads, out, lse, *args), {"memory_grad": True, **kwargs}


def select_tokens(m: Maker) -> Call:
    s, count = m.shape, m.shape.batch
    q, k = m.values(count, s.span, s.heads, s.dim), m.values(count, s.span, s.kv_heads, s.dim)
    options = {"tokens": s.tokens, "start": 0, "scale": s.dim**-0.5, "rule": "received"}
    return (q, k, m.index([s.span] * count)), options


def gather_memory(m: Maker) -> Call:
    s = m.shape
    sides = [m.values(s.batch, s.span, s.kv_heads, s.dim) for _ in range(2)]
    return (*sides, m.index([[[*range(0, s.span, s.span // s.tokens)]] * s.kv_heads] * s.batch)), {}


def scatter_memory(m: Maker) -> Call:
    s, count = m.shape, m.shape.batch * m.shape.refs
    records = m.values(count, 2, s.kv_heads, s.tokens, s.dim)
    return (m.values(2 * count, 2, s.kv_heads, s.tokens, s.dim), records, m.index([*range(0, 2 * count, 2)])), {}


def vq_dequantize(m: Maker) -> Call:
    s = m.shape
    vectors = s.batch * s.refs * s.kv_heads * s.tokens
    return (m.bytes(vectors, CODE), *m.book()), {"dtype": m.dtype}


def gather_dequantize(m: Maker) -> Call:
    s, count = m.shape, m.shape.batch * m.shape.refs
    codes = m.bytes(2 * count, s.kv_heads, (s.tokens * CODE + 15) // 16 * 16)
    return (codes, m.index([*range(0, 2 * count, 2)]), *m.book()), {"tokens": s.tokens, "dtype": m.dtype}


def merge_attention_states(m: Maker) -> Call:
    s = m.shape
    rows = s.batch * s.chunk
    side = lambda: (m.values(rows, s.heads, s.dim), m.values(rows, s.heads, dtype=torch.float32))  # noqa: E731
    return (*side(), *side()), {}


CALLS: dict[str, Callable[[Maker], Call]] = {
    f.__name__: f
    for f in (memory_decode, memory_decode_coded, memory_attention, memory_attention_backward, select_tokens,
              gather_memory, scatter_memory, vq_dequantize, gather_dequantize, merge_attention_states)
}  # fmt: skip


def make(op: str, shape: Shape, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Call:
    """Arguments of `op` at a shape, contiguous, without bias or head map; no value is zero by construction."""
    return CALLS[op](Maker(shape, dtype, device))
