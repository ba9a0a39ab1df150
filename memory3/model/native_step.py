"""Prompts and decoding steps as one native call (memory3_kernels.decode_step): weights as that op takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memory3_kernels import DECODE_STAGES, decode_step, native_reason, pages
from memory3_kernels.packed import BLOCK, join_weights

from ..memory import MemoryRead
from ..profiling import Profile, active
from .cache import KVCache

if TYPE_CHECKING:
    from .llama import Llama

# The op's stages under the names that profiles use for the other paths, too.
_SHOWN = {"linear": "linear", "ffn": "linear", "head": "linear", "attention": "attention", "wait": "wait for threads"}


def serves(net: Llama) -> bool:
    """Whether the native step can run this model: bfloat16 on a CPU, sizes in whole blocks, the library loaded."""
    c = net.config
    sizes = (c.dim, c.ffn_dim, c.n_heads * c.head_dim)
    on_cpu = net.embed.device.type == "cpu" and net.dtype is torch.bfloat16
    return on_cpu and native_reason() is None and not any(size % BLOCK for size in sizes)


class NativeStep:
    """Packed weights, norms and RoPE tables of one model; `current` says whether they are still its own."""

    def __init__(self, net: Llama) -> None:
        linears = [net.head]
        for block in reversed(net.blocks):
            linears = [block.qkv, block.out, block.gate_up, block.down, *linears]
        norms = [n.weight for block in net.blocks for n in (block.attn_norm, block.ffn_norm)] + [net.norm.weight]
        packed = [linear.inference_weight() for linear in linears]
        size = sum(weight.nbytes for weight in packed)
        self._weights, parts = join_weights(packed, pages.zeros((size,), torch.uint8))
        for linear, part in zip(linears, parts, strict=True):
            linear.keep(part)
        # Low-bit weights never change; dense ones may, between two calls.
        self._sources = [linear.weight for linear in linears if linear.packed is None]
        self._sources += norms if self._sources else []
        self._versions = self._seen()
        self._norms = torch.stack([n.detach().float() for n in norms])
        self._rope = torch.stack(net.rope.table(torch.float32, net.embed.device))
        self._ffn, self._heads = net.config.ffn_dim, net.config.n_heads
        self._eps, self._scale = net.config.norm_eps, net.scale
        self._profile = torch.zeros(len(DECODE_STAGES), dtype=torch.int64)

    def _seen(self) -> list[tuple[int, int]]:
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in self._sources]

    def current(self) -> bool:
        """False once a dense weight was changed in place or replaced."""
        return not self._sources or self._seen() == self._versions

    def __call__(
        self,
        embed: Tensor,
        tokens: Tensor,
        cache: KVCache,
        read: MemoryRead | None,
        memory_layers: tuple[int, ...],
        head_map: Tensor | None,
        cu: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """fp32 logits [B, V], or [n, V] of `rows`, and mass [T, R]; the caller counts the cache's lengths up.

        tokens: one per sequence, or packed, with cu [B + 1].
        """
        memory = [None] * 5 if read is None else [read.kv, read.slots, read.length, read.bias, head_map]
        if cu is not None:
            cut = None if read is None else read.cu_chunk.to(torch.int32)
            memory += [cu.to(torch.int32), cut, None if rows is None else rows.to(torch.int64)]
        profile = active()
        if profile is not None:
            self._profile.zero_()
        result = decode_step(
            tokens, torch.tensor(cache.lengths, dtype=torch.int32), cache.k, cache.v, embed, self._norms,
            self._rope, self._weights, *memory, ffn=self._ffn, memory_layers=() if read is None else memory_layers,
            heads=self._heads, span=cache.span, eps=self._eps, scale=self._scale, threads=torch.get_num_threads(),
            profile=None if profile is None else self._profile,
        )  # fmt: skip
        if profile is not None:
            self._report(profile)
        return result

    def _report(self, profile: Profile) -> None:
        for stage, nanoseconds in zip(DECODE_STAGES, self._profile.tolist(), strict=True):
            profile.add(_SHOWN.get(stage, "other"), nanoseconds / 1e9)
