"""A decoder of the Llama family that reads explicit memory in its memory layers.

Rows of all sequences are packed; every layer is one call of `memory_attention` (prefill, training) or
`memory_decode`, with no memory slots in layers that hold no memory (Memory3, arXiv 2407.01178, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memory3_kernels import memory_attention, memory_decode

from ..config import MemoryConfig, ModelConfig
from ..memory import MemoryRead
from ..profiling import span
from .cache import KVCache, Prefix
from .layers import Block, Linear, RMSNorm
from .native_step import NativeStep, serves
from .rope import Rope

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Llama(nn.Module):
    """Weights and the three ways to run them: packed forward, prefill into a cache, decode from a cache.

    Parameters are uninitialised; a checkpoint loader or `init_weights` fills them.
    `memory` says which layers read memory; without it no call may pass a MemoryRead.
    """

    def __init__(self, config: ModelConfig, memory: MemoryConfig | None = None) -> None:
        super().__init__()
        if memory is not None:
            memory.check(config)
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, self.embed if config.tied else None)
        self.scale = config.head_dim**-0.5
        self.rope = Rope(config)
        self.checkpointing = False  # recompute each layer in the backward pass instead of keeping its activations
        self._native: NativeStep | None = None
        self._set_memory(memory)

    def _set_memory(self, memory: MemoryConfig | None) -> None:
        self.memory = memory
        self._memory_index = {layer: i for i, layer in enumerate(memory.layers)} if memory else {}
        self._head_maps: Tensor | None = None
        if memory is not None and memory.head_map is not None:
            self._head_maps = torch.tensor(memory.head_map, dtype=torch.int32, device="cpu")

    def with_memory(self, memory: MemoryConfig | None) -> Llama:
        """The same weights (shared, not copied) with other memory layers and heads."""
        if memory is not None:
            memory.check(self.config)
        other = copy.copy(self)
        other._set_memory(memory)
        return other

    @property
    def dtype(self) -> torch.dtype:
        """What attention and memories compute in: the weights' dtype, or autocast's where it is on."""
        device = self.embed.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.embed.dtype

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> Llama:
        """Normal weights (layer outputs scaled by 1/sqrt(2 L), as GPT-2), unit norms."""
        generator = torch.Generator().manual_seed(seed)
        small = std / (2 * self.config.n_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, small if name.endswith(("out.weight", "down.weight")) else std, generator=generator)
        return self

    # -- pieces shared by all three ways ------------------------------------------------------------------

    def split(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[T, Hq + 2 Hkv, D] before RoPE -> rotated q [T, Hq, D], rotated k and plain v [T, Hkv, D]."""
        hq, hkv = self.config.n_heads, self.config.n_kv_heads
        rotated = self.rope.rotate(qkv[:, : hq + hkv], rotary).to(qkv.dtype)  # under autocast the tables are wider
        return rotated[:, :hq], rotated[:, hq:], qkv[:, hq + hkv :]

    def _run(self, tokens: Tensor, positions: Sequence[int] | np.ndarray, attend: Attend) -> Tensor:
        x = self.embed[tokens]
        positions = torch.from_numpy(np.asarray(positions, np.int64)).to(tokens.device)
        rotary = self.rope.at(positions, x.dtype)

        def run(layer: int, x: Tensor) -> Tensor:
            block = self.blocks[layer]
            q, k, v = self.split(block.project(x), rotary)
            with span("attention"):
                attended = attend(layer, q, k, v)
            return block.finish(x, attended)

        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in range(self.config.n_layers):
            x = checkpoint(run, layer, x, use_reentrant=False) if recompute else run(layer, x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden rows [T, dim] of the last layer -> fp32 logits [T, V] (fp64 for an fp64 model)."""
        logits = self.head(self.norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def memory_args(self, layer: int, read: MemoryRead | None, count: int) -> tuple:
        """The six memory operands of the ops for one layer; `count` chunks (or sequences)."""
        index = self._memory_index.get(layer, -1)
        if read is None or index < 0:
            device = self.embed.device
            none = torch.empty((0, self.config.n_kv_heads, 1, self.config.head_dim), dtype=self.dtype, device=device)
            lengths = torch.empty(0, dtype=torch.int32, device=device)
            return none, none, torch.empty((count, 0), dtype=torch.int32, device=device), lengths, None, None
        bias = None if read.bias is None else read.bias[:, index]
        head_map = None if self._head_maps is None else self._head_maps[index].to(read.slots.device)
        return read.kv[:, index, 0], read.kv[:, index, 1], read.slots, read.length, bias, head_map

    def _check_read(self, read: MemoryRead | None, chunks: int | None) -> None:
        if read is None:
            return
        if self.memory is None:
            raise ValueError("read needs a model with a memory configuration; pass memory=MemoryConfig(...)")
        want = self.memory.record_shape(self.config)
        if tuple(read.kv.shape[1:]) != want or read.kv.dtype != self.dtype:
            raise ValueError(
                f"read.kv must be [S, {', '.join(map(str, want))}] of {self.dtype}, "
                f"got {tuple(read.kv.shape)} of {read.kv.dtype}"
            )
        if chunks is None and read.cu_chunk is None:
            raise ValueError("read.cu_chunk must be given for prefill and for a packed forward")
        expected = chunks if chunks is not None else len(read.cu_chunk) - 1
        if read.slots.dim() != 2 or read.slots.shape[0] != expected:
            raise ValueError(f"read.slots must be [{expected}, R], got {tuple(read.slots.shape)}")
        if read.collect_mass:
            read.mass = None

    def _note_mass(self, read: MemoryRead | None, layer: int, mass: Tensor) -> None:
        if read is None or not read.collect_mass or layer not in self._memory_index:
            return
        part = mass.detach().mean(dim=1) / len(self._memory_index)
        read.mass = part if read.mass is None else read.mass + part

    # -- packed forward -----------------------------------------------------------------------------------

    def hidden(
        self, tokens: Tensor, cu: Tensor, read: MemoryRead | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """Hidden rows [T, dim] of packed sequences, no cache; differentiable in the weights, prefix and memories.

        tokens int64 [T]; cu int32 [B + 1], on any device (on the CPU the call does not wait for the GPU). Positions
        start at 0, or after `prefix` and its span: m + span.
        """
        self._check_read(read, None)
        counts = _counts(cu, tokens)
        offset = 0 if prefix is None else prefix.k.shape[1] + prefix.span
        self._check_positions(offset, counts)
        positions = offset + places(counts)
        m = 0 if prefix is None else prefix.k.shape[1]
        cu = cu.to(tokens.device, torch.int32)
        cu_k = cu + m * torch.arange(len(counts) + 1, dtype=torch.int32, device=cu.device)
        take = with_prefix_rows(counts, m, tokens.device) if m else None
        cu_chunk = cu if read is None else read.cu_chunk
        max_q = max(counts, default=0)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if take is not None:
                k = torch.cat((prefix.k[layer], k)).index_select(0, take)
                v = torch.cat((prefix.v[layer], v)).index_select(0, take)
            out, _, mass = memory_attention(
                q, k, v, cu, cu_k, cu_chunk, *self.memory_args(layer, read, len(cu_chunk) - 1),
                scale=self.scale, max_q=max_q, max_k=max_q + m, max_chunk=max_q,
            )  # fmt: skip
            self._note_mass(read, layer, mass)
            return out

        return self._run(tokens, positions, attend)

    def forward(
        self, tokens: Tensor, cu: Tensor, read: MemoryRead | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """fp32 logits [T, V] of all rows; arguments as `hidden`."""
        return self.logits(self.hidden(tokens, cu, read, prefix))

    def encode_prefix(self, ids: Sequence[int], span: int) -> Prefix:
        """Key-values of the constant prefix, which every reference and every context in memory mode starts with."""
        keys, values = [], []
        tokens = torch.tensor(list(ids), dtype=torch.int64, device=self.embed.device)
        cu = torch.tensor([0, len(tokens)], dtype=torch.int32, device=self.embed.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            out, _, _ = memory_attention(
                q, k, v, cu, cu, cu, *self.memory_args(layer, None, 1),
                scale=self.scale, max_q=len(tokens), max_k=len(tokens), max_chunk=len(tokens),
            )  # fmt: skip
            return out

        self._run(tokens, range(len(tokens)), attend)
        return Prefix(torch.stack(keys), torch.stack(values), span)

    # -- with a cache -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, cu: Tensor, cache: KVCache, read: MemoryRead | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Append packed tokens to every sequence of the cache, which may already hold some.

        One native call for a bfloat16 model on a CPU (native_step.py), else layer by layer.

        tokens int64 [T]; cu int32 [B + 1], empty sequences allowed. read.cu_chunk cuts the T query rows.
        Returns fp32 logits [B, V] of each sequence's last token (zeros for an empty one), or of `rows` [n] -> [n, V].
        Raises ContextFull, before anything is written, when a sequence does not fit.
        """
        with span("other"):
            return self._prefill(tokens, cu, cache, read, rows)

    def _prefill(
        self, tokens: Tensor, cu: Tensor, cache: KVCache, read: MemoryRead | None, rows: Tensor | None
    ) -> Tensor:
        self._check_read(read, None)
        counts = _counts(cu, tokens)
        cache.make_room(counts)
        before = list(cache.lengths)
        totals = [a + b for a, b in zip(before, counts, strict=True)]
        if self._goes_native(cache):
            logits = self._run_native(tokens, cache, read, cu, rows)
            cache.lengths = totals
            return logits
        device, n = tokens.device, cache.capacity
        write = _flat_rows(before, totals, n, device)
        # Keys as they lie: a sequence alone needs no copy; the others are gathered into packed rows.
        gather = _flat_rows([0] * len(totals), totals, n, device) if len(totals) != 1 else None
        cu = cu.to(torch.int32)
        cu_k = _offsets(totals, device)
        cu_chunk = cu if read is None else read.cu_chunk
        max_q, max_k = max(counts, default=0), max(totals, default=0)

        def packed(flat: Tensor) -> Tensor:
            return flat[: totals[0]] if gather is None else flat.index_select(0, gather)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat_k, flat_v = cache.k[layer].flatten(0, 1), cache.v[layer].flatten(0, 1)
            flat_k.index_copy_(0, write, k)
            flat_v.index_copy_(0, write, v)
            out, _, mass = memory_attention(
                q, packed(flat_k), packed(flat_v), cu, cu_k, cu_chunk,
                *self.memory_args(layer, read, len(cu_chunk) - 1),
                scale=self.scale, max_q=max_q, max_k=max_k, max_chunk=max_q,
            )  # fmt: skip
            self._note_mass(read, layer, mass)
            return out

        hidden = self._run(tokens, cache.positions(counts), attend)
        cache.lengths = totals
        if rows is not None:
            return self.logits(hidden.index_select(0, rows.to(torch.int64)))
        filled = [b for b, count in enumerate(counts) if count]
        last = (cu[1:].to(torch.int64) - 1)[filled]
        logits = self.logits(hidden.index_select(0, last))
        if len(filled) == len(counts):
            return logits
        out = logits.new_zeros((len(counts), self.config.vocab_size))
        out[filled] = logits
        return out

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache, read: MemoryRead | None = None) -> Tensor:
        """Append one token to every sequence: tokens int64 [B], read.slots [B, R] -> fp32 logits [B, V].

        One native call for a bfloat16 model on a CPU (native_step.py), else layer by layer.
        Raises ContextFull, before anything is written, when a sequence does not fit.
        """
        with span("other"):
            return self._decode(tokens, cache, read)

    def _decode(self, tokens: Tensor, cache: KVCache, read: MemoryRead | None) -> Tensor:
        if tokens.dim() != 1:
            raise ValueError(f"tokens must be [B], one per sequence, got {tuple(tokens.shape)}")
        batch, device = cache.batch, tokens.device
        self._check_read(read, batch)
        ones = [1] * len(tokens)
        cache.make_room(ones)
        before = list(cache.lengths)
        totals = [a + 1 for a in before]
        if self._goes_native(cache):
            logits = self._run_native(tokens, cache, read)
            cache.lengths = totals
            return logits
        write = torch.tensor([b * cache.capacity + r for b, r in enumerate(before)], device=device)
        kv_len = torch.tensor(totals, dtype=torch.int32, device=device)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device)
        max_kv = max(totals, default=0)
        plain = self.memory_args(-1, None, batch)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = cache.k[layer], cache.v[layer]
            k_cache.flatten(0, 1).index_copy_(0, write, k)
            v_cache.flatten(0, 1).index_copy_(0, write, v)
            has_memory = read is not None and layer in self._memory_index
            memory = self.memory_args(layer, read, batch) if has_memory else plain
            out, _, mass = memory_decode(
                q, k_cache, v_cache, kv_len, None, cu, *memory, scale=self.scale, max_q=1, max_kv=max_kv
            )
            self._note_mass(read, layer, mass)
            return out

        hidden = self._run(tokens, cache.positions(ones), attend)
        cache.lengths = totals
        return self.logits(hidden)

    def _goes_native(self, cache: KVCache) -> bool:
        return serves(self) and cache.k.dtype is torch.bfloat16

    def _run_native(
        self, tokens: Tensor, cache: KVCache, read: MemoryRead | None, cu: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of one native call: one token per sequence, or those of `cu`."""
        if self._native is None or not self._native.current():
            self._native = NativeStep(self)
        layers = self.memory.layers if self.memory is not None else ()
        logits, mass = self._native(self.embed.detach(), tokens, cache, read, layers, self._head_maps, cu, rows)
        if read is not None and read.collect_mass:
            read.mass = mass
        return logits

    def _check_positions(self, offset: int, counts: Sequence[int]) -> None:
        longest = max(counts, default=0)
        if offset + longest > self.config.max_context:
            raise ValueError(
                f"a sequence of {longest} tokens that starts at position {offset} exceeds "
                f"max_context={self.config.max_context}; use shorter sequences"
            )


def _counts(cu: Tensor, tokens: Tensor) -> list[int]:
    ends = cu.tolist()
    counts = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    if not ends or ends[0] != 0 or ends[-1] != tokens.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"cu must ascend from 0 to the {tokens.shape[0]} tokens given, got {ends[:8]}")
    return counts


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    total, out = 0, [0]
    for count in counts:
        total += count
        out.append(total)
    return torch.tensor(out, dtype=torch.int32, device=device)


def _flat_rows(starts: Sequence[int], ends: Sequence[int], stride: int, device: torch.device) -> Tensor:
    parts = [
        torch.arange(b * stride + lo, b * stride + hi) for b, (lo, hi) in enumerate(zip(starts, ends, strict=True))
    ]
    return torch.cat(parts).to(device) if parts else torch.empty(0, dtype=torch.int64, device=device)


def with_prefix_rows(counts: Sequence[int], m: int, device: torch.device) -> Tensor:
    """Rows of cat(prefix [m], packed [T]) that put the prefix in front of every packed sequence."""
    own = np.asarray(counts, np.int64)
    place = places(own + m)  # in its sequence; a packed row lies behind the prefix and all sequences before
    shift = np.repeat(own.cumsum() - own, own + m)
    return torch.from_numpy(np.where(place < m, place, place + shift)).to(device)


def places(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [sum of counts], 0, 1, ... in each sequence."""
    counts = np.asarray(counts, np.int64)
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
