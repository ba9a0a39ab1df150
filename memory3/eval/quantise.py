"""Vector quantisation on any device: books trained and memories encoded in torch, where FAISS knows CPUs only.

The family is memory3.bank.codec's, `OPQ{M}_{d},Residual2x{b},PQ{m}x{n}`: nearest coarse entries of both halves, then
nearest fine entries of the rest, part by part, as FAISS encodes; the books differ from FAISS' as two draws do.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..bank.codec import Codec, Spec, Tables
from .answer import Loaded

ROWS = 1 << 16  # vectors at once: 64 parts x 65,536 x 256 distances are 4 GB
STEPS, OPQ_STEPS, OPQ_INNER = 25, 50, 4


def needed(device: torch.device | str) -> bool:
    """Whether FAISS cannot do it: on an accelerator, or where it is not installed."""
    return torch.device(device).type != "cpu" or find_spec("faiss") is None


def through(codec: Codec, kv: Tensor) -> Tensor:
    """kv [..., 2, Hm, K, D] encoded and decoded, on its own device; rows of zeros (no token) come back as anything."""
    out = torch.empty_like(kv)
    for plane, tables in enumerate((codec.keys, codec.values)):
        tables = _to(tables, kv.device)
        part = kv[..., plane, :, :, :]
        rows = [nearest(tables, x.float()) for x in part.reshape(-1, kv.shape[-1]).split(ROWS)]
        if rows:
            out[..., plane, :, :, :] = torch.cat([r.to(kv.dtype) for r in rows]).view(part.shape)
    return out


def nearest(tables: Tables, x: Tensor) -> Tensor:
    """fp32 [N, D] -> what their codes stand for."""
    turned = x if tables.rot is None else x @ tables.rot.T
    coarse = _quantise(tables.coarse, turned)
    found = coarse + _quantise(tables.fine, turned - coarse)
    return found if tables.rot is None else found @ tables.rot


def train(spec: str, memories: Loaded, most: int, seed: int = 0) -> Codec:
    """Books trained on at most so many valid keys, and values, on their device; the codec itself is on the CPU."""
    kv = memories.kv[list(memories.slot.values())]
    tokens = kv.shape[4]
    valid = torch.arange(tokens, device=kv.device) < memories.length[list(memories.slot.values()), None]
    valid = valid[:, None, None].expand(-1, kv.shape[1], kv.shape[3], -1)
    parsed, books = Spec.parse(spec, kv.shape[-1]), []
    for plane in range(2):
        vectors = kv[:, :, plane][valid].float()
        generator = torch.Generator(kv.device).manual_seed(seed)
        vectors = vectors[torch.randperm(len(vectors), device=kv.device, generator=generator)[:most]]
        books.append(_to(_train(parsed, vectors, generator), torch.device("cpu")))
    return Codec(spec, *books)


def _train(spec: Spec, x: Tensor, generator: torch.Generator) -> Tables:
    rot = _rotation(spec, x, generator) if spec.rotation else None
    turned = x if rot is None else x @ rot.T
    coarse = _means(turned, 2, 1 << spec.coarse_bits, STEPS, generator)
    fine = _means(turned - _quantise(coarse, turned), spec.fine_parts, 1 << spec.fine_bits, STEPS, generator)
    return Tables(coarse, fine, rot)


def _rotation(spec: Spec, x: Tensor, generator: torch.Generator) -> Tensor:
    """OPQ: rotation and a product quantizer of M parts in turns (Ge et al. 2013)."""
    rot = torch.linalg.qr(torch.randn(spec.dim, spec.dim, device=x.device, generator=generator))[0]
    book = None
    for _ in range(OPQ_STEPS):
        turned = x @ rot.T
        book = _means(turned, spec.rotation, 256, OPQ_INNER, generator, book)
        left, _, right = torch.linalg.svd(_quantise(book, turned).T @ x)
        rot = left @ right
    return rot


def _means(
    x: Tensor, parts: int, count: int, steps: int, generator: torch.Generator, start: Tensor | None = None
) -> Tensor:
    """k-means of each part of x [N, D] by itself: [parts, count, D / parts]; a mean that nothing is near stays."""
    pieces = x.unflatten(1, (parts, -1)).transpose(0, 1).contiguous()
    if start is None:
        start = pieces[:, torch.randperm(len(x), device=x.device, generator=generator)[:count]]
    means, ones = start.clone(), torch.ones(len(x), device=x.device)
    for _ in range(steps):
        for part, (mean, vectors) in enumerate(zip(means, pieces, strict=True)):
            near = _nearest(mean[None], vectors[None])[0]
            sums = torch.zeros_like(mean).index_add_(0, near, vectors)
            counts = torch.zeros(count, device=x.device).index_add_(0, near, ones)[:, None]
            means[part] = torch.where(counts > 0, sums / counts.clamp_min(1), mean)
    return means


def _quantise(book: Tensor, x: Tensor) -> Tensor:
    """The nearest entries of book [parts, count, d] to the parts of x [N, parts d], put together again."""
    pieces = x.unflatten(1, (len(book), -1)).transpose(0, 1)
    near = _nearest(book, pieces)
    return book.gather(1, near[..., None].expand(-1, -1, book.shape[2])).transpose(0, 1).flatten(1)


def _nearest(book: Tensor, pieces: Tensor) -> Tensor:
    """int64 [parts, N] for pieces [parts, N, d]."""
    shift = 0.5 * book.square().sum(-1)
    found = [torch.baddbmm(shift[:, None], x, book.mT, alpha=-1).argmin(-1) for x in pieces.split(ROWS, 1)]
    return torch.cat(found, 1)


def _to(tables: Tables, device: torch.device) -> Tables:
    return Tables(*(None if t is None else t.to(device) for t in (tables.coarse, tables.fine, tables.rot)))
