"""A whole run in plain PyTorch, one dense softmax per layer: nothing of it comes from the package but the weights.

Rows are the prefix at 0..m-1 and the context from m + span on; memory tokens stand in front of them as more columns.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def rotate(x, positions, base):
    """x [T, H, D]; pairs (i, i + D/2) turn by position / base^(2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None].double() * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def logits_of(model, context, sets):
    """Logits [len(context), V]; sets[i]: the Memory objects that context row i reads. sets None: the plain model."""
    net, config, memory = model.net, model.config, model.memory
    plain = sets is None
    prefix = [] if plain else list(memory.prefix_ids)
    m = len(prefix)
    rows = m + len(context)
    positions = torch.arange(rows)
    positions[m:] += 0 if plain else memory.span
    group = config.n_heads // config.n_kv_heads
    pool = [] if plain else list({id(one): one for row in sets for one in row}.values())
    reads = torch.zeros(rows, len(pool), dtype=torch.bool)
    for i, row in enumerate(sets or ()):
        for j, one in enumerate(pool):
            reads[m + i, j] = any(one is other for other in row)
    causal = torch.ones(rows, rows).tril().bool()
    x = net.embed[torch.tensor(prefix + list(context))]
    for layer, block in enumerate(net.blocks):
        qkv = rms(x, block.attn_norm.weight, config.norm_eps) @ block.qkv.weight.T
        q, k, v = qkv.view(rows, -1, config.head_dim).split([config.n_heads, config.n_kv_heads, config.n_kv_heads], 1)
        q, k = rotate(q, positions, config.rope_base), rotate(k, positions, config.rope_base)
        out = []
        for head in range(config.n_heads):
            kv = head // group
            keys, values, visible, bias = [k[:, kv]], [v[:, kv]], [causal], [torch.zeros(rows)]
            if layer in memory.layers:
                index = memory.layers.index(layer)
                mine = kv if memory.head_map is None else memory.head_map[index][kv]
                for j, one in enumerate(pool if mine >= 0 else ()):
                    n = one.n_valid
                    keys.append(one.kv[index, 0, mine, :n])
                    values.append(one.kv[index, 1, mine, :n])
                    visible.append(reads[:, j : j + 1].expand(rows, n))
                    bias.append(torch.zeros(n) if one.bias is None else one.bias[index, mine, :n])
            score = q[:, head] @ torch.cat(keys).T * config.head_dim**-0.5 + torch.cat(bias)
            weight = score.masked_fill(~torch.cat(visible, 1), -torch.inf).softmax(-1)
            out.append(weight @ torch.cat(values))
        x = x + torch.stack(out, 1).flatten(1) @ block.out.weight.T
        gate, up = (rms(x, block.ffn_norm.weight, config.norm_eps) @ block.gate_up.weight.T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ block.down.weight.T
    return (rms(x, net.norm.weight, config.norm_eps) @ net.head.weight.T)[m:]


class Retriever:
    """Brute-force cosine over a bank."""

    def __init__(self, bank, embedder):
        self.ids = list(bank.ids())
        self.vectors = np.stack([bank.embedding(i) for i in self.ids])
        self.memories = dict(zip(self.ids, bank.get(self.ids), strict=True))
        self.embedder = embedder

    def __call__(self, text, refs):
        order = np.argsort(-(self.vectors @ self.embedder.vector(text)), kind="stable")[:refs]
        return [self.ids[i] for i in order]


def schedule(prompt_tokens, generated, tokenizer, memory, opening=1):
    """Query text of every context row (opening, prompt, generated), by the chunk rule as the paper tells it."""
    chunk, queries = memory.chunk, []
    for start in range(0, len(prompt_tokens), chunk):
        piece = prompt_tokens[start : start + chunk]
        if start == 0 or len(piece) >= memory.min_query:
            current = tokenizer.decode(piece, skip_special=True)
        queries += [current] * (len(piece) + (opening if start == 0 else 0))
    for j in range(len(generated)):
        if (j + 1) % chunk == 0:  # the pass that takes the 64th token is the first one with new memories
            current = tokenizer.decode(generated[j + 1 - chunk : j + 1], skip_special=True)
        queries.append(current)
    return queries
