"""Writing: references become explicit memories (Memory3, arXiv 2407.01178, section 3.2).

Each reference is encoded alone after the constant prefix, at positions m, m + 1, ...; per memory layer and head the
K tokens that receive most attention are kept, keys after RoPE. Layers after the last memory layer never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from memory3_kernels import gather_memory, memory_attention, select_tokens

from .config import MemoryConfig
from .memory import Memory
from .model.cache import Prefix
from .model.llama import Llama, places, with_prefix_rows

# Rows per encoding batch: the matrix products are at full speed from a few hundred rows on (CPU), and activations
# stay small.
BATCH_ROWS = 1024
BATCH_ROWS_GPU = 1 << 15  # there a small pass costs as much as a large one


def encode_references(
    net: Llama, memory: MemoryConfig, prefix: Prefix, references: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Encode references in one ragged batch; differentiable in the weights and the prefix.

    references: N token lists, each 1..span long, without the prefix; prefix: net.encode_prefix(prefix_ids, span).
    Returns kv [N, Lm, 2, Hm, K, D] in the model's dtype (rows without a token are zero) and pos int32
    [N, Lm, Hm, K], the 0-based position within the reference, -1 none.
    Raises ValueError naming the reference that is empty or too long.
    """
    counts = [len(r) for r in references]
    for i, count in enumerate(counts):
        if not 0 < count <= memory.span:
            raise ValueError(f"references[{i}] must have 1..{memory.span} tokens (span), got {count}")
    config, device = net.config, net.embed.device
    shape = memory.record_shape(config)
    if not references:
        kv = torch.empty((0, *shape), dtype=net.dtype, device=device)
        return kv, torch.empty((0, shape[0], *shape[2:4]), dtype=torch.int32, device=device)
    m, longest = prefix.k.shape[1], max(counts)
    flat = np.fromiter(chain.from_iterable(references), np.int64, sum(counts))
    ends_of = np.concatenate(([0], np.cumsum(counts)))
    inside = places(counts)
    tokens, positions = (torch.from_numpy(x).to(device) for x in (flat, m + inside))
    ends = torch.from_numpy(ends_of.astype(np.int32)).to(device)
    ends_k = ends + m * torch.arange(len(counts) + 1, dtype=torch.int32, device=device)
    take = with_prefix_rows(counts, m, device)
    length = torch.tensor([m + n for n in counts], dtype=torch.int32, device=device)
    pad = _Padding(counts, inside, m, longest, device)

    x = net.embed[tokens]
    rotary = net.rope.at(positions, x.dtype)
    kv_layers, pos_layers = [], []
    last = memory.layers[-1]
    for layer, block in enumerate(net.blocks[: last + 1]):
        qkv = block.project(x)
        q, k, v = net.split(qkv, rotary)
        if layer in memory.layers:
            index = memory.layers.index(layer)
            heads = None if memory.head_map is None else memory.kv_heads(index, config.n_kv_heads)
            if memory.rule == "causal":
                score_q, score_k, prefix_k = q, k, prefix.k[layer]
            else:  # before RoPE; the prefix takes no part, so its rows may hold anything finite
                score_q, score_k = qkv[:, : config.n_heads], qkv[:, config.n_heads : -config.n_kv_heads]
                prefix_k = None
            with torch.no_grad():
                chosen = select_tokens(
                    _pick_queries(pad(score_q, None), heads, config.n_kv_heads), _pick(pad(score_k, prefix_k), heads),
                    length, tokens=memory.tokens, start=m, scale=net.scale, rule=memory.rule,
                )  # fmt: skip
            keys = _pick(pad(k, prefix.k[layer]), heads)
            values = _pick(pad(v, prefix.v[layer]), heads)
            kv_layers.append(gather_memory(keys, values, chosen))
            pos_layers.append(torch.where(chosen >= 0, chosen - m, chosen))
        if layer == last:
            break
        k = torch.cat((prefix.k[layer], k)).index_select(0, take)
        v = torch.cat((prefix.v[layer], v)).index_select(0, take)
        out, _, _ = memory_attention(
            q, k, v, ends, ends_k, ends, *net.memory_args(layer, None, len(counts)),
            scale=net.scale, max_q=longest, max_k=longest + m, max_chunk=longest,
        )  # fmt: skip
        x = block.finish(x, out)
    return torch.stack(kv_layers, dim=1), torch.stack(pos_layers, dim=1).to(torch.int32)


@torch.no_grad()
def write_memories(
    net: Llama,
    memory: MemoryConfig,
    prefix: Prefix,
    references: Sequence[Sequence[int]],
    texts: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch_rows: int = BATCH_ROWS,
) -> list[Memory]:
    """Memories of references (token lists without the prefix; tokens beyond `span` are cut off), in their order.

    Batches hold references of similar length, at most `batch_rows` rows. progress(done, total) after each batch.
    Raises ValueError naming an empty reference.
    """
    if texts is not None and len(texts) != len(references):
        raise ValueError(f"texts must have one entry per reference ({len(references)}), got {len(texts)}")
    cut = [list(map(int, r))[: memory.span] for r in references]
    for i, ids in enumerate(cut):
        if not ids:
            raise ValueError(f"references[{i}] has no tokens; leave empty texts out")
        if min(ids) < 0 or max(ids) >= net.config.vocab_size:
            raise ValueError(f"references[{i}] has a token id outside 0..{net.config.vocab_size - 1}")
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
    out: list[Memory | None] = [None] * len(cut)
    done = 0
    for batch in by_length(order, cut, batch_rows):
        kv, pos = encode_references(net, memory, prefix, [cut[i] for i in batch])
        kv, pos = kv.cpu(), pos.cpu()
        for row, i in enumerate(batch):
            out[i] = Memory(
                kv=kv[row].clone(),
                pos=pos[row].clone(),
                n_valid=min(memory.tokens, len(cut[i])),
                token_ids=cut[i],
                text=texts[i] if texts is not None else "",
            )
        done += len(batch)
        if progress is not None:
            progress(done, len(cut))
    return out


def by_length(order: Sequence[int], references: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """`order`, which is by ascending length, cut into batches of at most `rows` padded rows."""
    batches: list[list[int]] = []
    for i in order:  # the newest one sets the padded length
        if not batches or (len(batches[-1]) + 1) * len(references[i]) > rows:
            batches.append([])
        batches[-1].append(i)
    return batches


def rows_at_once(device: torch.device) -> int:
    """Rows of a batch of references that are written together on a device."""
    return BATCH_ROWS if device.type == "cpu" else BATCH_ROWS_GPU


class _Padding:
    """Packed rows [T, H, D] -> [N, m + longest, H, D]: the prefix's rows first, zeros behind each sequence."""

    def __init__(self, counts: Sequence[int], inside: np.ndarray, m: int, longest: int, device: torch.device) -> None:
        """inside: place of each packed row in its own sequence."""
        self.shape = (len(counts), m + longest)
        self.m = m
        starts = m + (m + longest) * np.arange(len(counts))
        self.rows = torch.from_numpy(np.repeat(starts, counts) + inside).to(device)

    def __call__(self, packed: Tensor, prefix: Tensor | None) -> Tensor:
        flat = packed.new_zeros((self.shape[0] * self.shape[1], *packed.shape[1:]))
        padded = flat.index_copy(0, self.rows, packed).view(*self.shape, *packed.shape[1:])
        if prefix is None or not self.m:
            return padded
        head = prefix.unsqueeze(0).expand(self.shape[0], -1, -1, -1)
        return torch.cat((head, padded[:, self.m :]), dim=1)


def _pick(x: Tensor, heads: Sequence[int] | None) -> Tensor:
    """[N, T, Hkv, D] -> the KV heads that records hold."""
    return x if heads is None else x[:, :, heads]


def _pick_queries(q: Tensor, heads: Sequence[int] | None, n_kv_heads: int) -> Tensor:
    """[N, T, Hq, D] -> the query heads of those KV heads."""
    if heads is None:
        return q
    return q.unflatten(2, (n_kv_heads, -1))[:, :, heads].flatten(2, 3)
