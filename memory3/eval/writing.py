"""Memories for an evaluation: written when first read, kept in RAM, and quantised or refitted where an arm asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from memory3_kernels import memory_attention

from ..bank.codec import Codec
from ..bank.format import Layout
from ..model.cache import Prefix
from ..model.llama import Llama, with_prefix_rows
from ..write import encode_references
from .answer import Loaded
from .refit import mass_bias, refit_values
from .sets import References

KEPT_BYTES = 1 << 30
BATCH = 8


class Writer:
    """Writes references of one knowledge base with one net and its memory configuration.

    codec   memories are encoded and decoded; plain: a writer of the same memories without the codec, to take them from
    refit   as memory3.eval.arms.Arm
    """

    def __init__(
        self, net: Llama, among: References, codec: Codec | None = None, refit: str = "", plain: Writer | None = None
    ) -> None:
        self.net, self.among, self.codec, self.refit, self._plain = net, among, codec, refit, plain
        with torch.no_grad():
            self.prefix = net.encode_prefix(net.memory.prefix_ids, net.memory.span)
        shape = net.memory.record_shape(net.config)
        self._most = max(64, KEPT_BYTES // (2 * torch.Size(shape).numel()))
        self._kept: OrderedDict[int, tuple[Tensor, Tensor | None]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Loaded:
        """The memories of these references, each once."""
        wanted = list(dict.fromkeys(numbers))
        missing = sorted((n for n in wanted if n not in self._kept), key=lambda n: len(self.among.tokens[n]))
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            self._kept.update(zip(part, self._write(part), strict=True))
        for n in wanted:
            self._kept.move_to_end(n)
        memory = self.net.memory
        kv = torch.stack([self._kept[n][0] for n in wanted]) if wanted else None
        if kv is None:
            kv = torch.empty((0, *memory.record_shape(self.net.config)), dtype=self.net.dtype)
        bias = torch.stack([self._kept[n][1] for n in wanted]) if self.refit and wanted else None
        length = [min(memory.tokens, len(self.among.tokens[n]), memory.span) for n in wanted]
        found = Loaded({n: i for i, n in enumerate(wanted)}, kv, torch.tensor(length, dtype=torch.int32), bias)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found

    def _write(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        net, memory = self.net, self.net.memory
        if self.codec is not None:
            return self._coded(self._plain(numbers))
        references = [self.among.tokens[n][: memory.span] for n in numbers]
        kv, pos = encode_references(net, memory, self.prefix, references)
        out = []
        for i, reference in enumerate(references):
            one, bias = kv[i].clone(), None
            if self.refit:
                one, bias = self._refitted(reference, one, pos[i])
            out.append((one, bias))
        return out

    def _coded(self, loaded: Loaded) -> list[tuple[Tensor, Tensor | None]]:
        """In the order they were asked for, which is that of the slots."""
        layers, _, heads, tokens, dim = loaded.kv.shape[1:]
        kv = self.codec.decode(self.codec.encode(loaded.kv), Layout(layers, heads, tokens, dim, loaded.kv.dtype))
        biases = [None] * len(kv) if loaded.bias is None else list(loaded.bias)
        return [(one.clone(), bias) for one, bias in zip(kv, biases, strict=True)]

    def _refitted(self, reference: Sequence[int], kv: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """The memory with bias and values fitted to what the reference's own queries would read from all its tokens."""
        net, memory = self.net, self.net.memory
        group = net.config.n_heads // net.config.n_kv_heads
        biases = torch.zeros(pos.shape)
        layers = trace(net, self.prefix, reference)
        for index, layer in enumerate(memory.layers):
            q, k, v = layers[layer]
            q = net.rope.shift(q, memory.span)
            for record_head, head in enumerate(memory.kv_heads(index, net.config.n_kv_heads)):
                valid = int((pos[index, record_head] >= 0).sum())
                if valid in (0, len(reference)):
                    continue
                queries = q[:, head * group : (head + 1) * group].flatten(0, 1)
                keys, values = k[:, head], v[:, head]
                kept, old = kv[index, 0, record_head, :valid], kv[index, 1, record_head, :valid]
                bias = torch.zeros(valid)
                if self.refit != "value":
                    bias = mass_bias(queries, keys, kept, net.scale)
                if self.refit != "bias":
                    old.copy_(refit_values(queries, keys, values, kept, old, bias, net.scale))
                biases[index, record_head, :valid] = bias
        return kv, biases


@torch.no_grad()
def trace(net: Llama, prefix: Prefix, reference: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rotated q [T, Hq, D], rotated k and plain v [T, Hkv, D] of every layer, as the reference is written."""
    count, m = len(reference), prefix.k.shape[1]
    tokens = torch.tensor(list(reference))
    cu, cu_k = torch.tensor([0, count], dtype=torch.int32), torch.tensor([0, m + count], dtype=torch.int32)
    take = with_prefix_rows([count], m, tokens.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((q, k, v))
        keys = torch.cat((prefix.k[layer], k)).index_select(0, take)
        values = torch.cat((prefix.v[layer], v)).index_select(0, take)
        return memory_attention(
            q, keys, values, cu, cu_k, cu, *net.memory_args(-1, None, 1),
            scale=net.scale, max_q=count, max_k=m + count, max_chunk=count,
        )[0]  # fmt: skip

    net._run(tokens, range(m, m + count), attend)
    return found
