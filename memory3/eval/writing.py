"""Memories for an evaluation: written when first read, kept by the model, quantised or refitted where an arm asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from memory3_kernels import memory_attention

from ..bank.codec import Codec
from ..bank.format import Layout
from ..model.cache import Prefix
from ..model.llama import Llama, with_prefix_rows
from ..write import encode_references
from .answer import Loaded
from .quantise import needed, through
from .refit import mass_bias, refit_values

KEPT_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
PART_BYTES = {"cpu": 1 << 28, "cuda": 2 << 30}  # of memories that one forward pass makes
ROWS = {"cpu": 1024, "cuda": 1 << 16}  # and its tokens
REFITTED = {"cpu": 64, "cuda": 256}  # references at once: scores of 3 T queries and T keys, fp32, for every one of them


class Writer:
    """Writes references of one knowledge base with one net and its memory configuration.

    kept     bytes of memories that stay, those that were read last; they are written again when they come back
    codec    memories are encoded and decoded; refit as memory3.eval.arms.Arm
    plain    a writer of the same memories without the codec, or with more layers and heads, to take them from
    """

    def __init__(
        self,
        net: Llama,
        among: Sequence[Sequence[int]],
        codec: Codec | None = None,
        refit: str = "",
        plain: Writer | None = None,
        kept: int | None = None,
    ) -> None:
        self.net, self.among, self.codec, self.refit, self._plain = net, among, codec, refit, plain
        self.device = net.embed.device
        self._bytes = KEPT_BYTES[self.device.type] if kept is None else kept
        self._size = torch.Size(net.memory.record_shape(net.config)).numel() * net.embed.element_size()
        self._slots: OrderedDict[int, int] = OrderedDict()  # by number of the reference, the latest last
        self._free: list[int] = []
        self._kv = self._bias = self._length = None

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Loaded:
        """The memories of these references; good until the next call."""
        wanted = list(dict.fromkeys(numbers))
        self._make_room(len(wanted))
        for n in wanted:
            if n in self._slots:
                self._slots.move_to_end(n)
        missing = sorted((n for n in wanted if n not in self._slots), key=lambda n: len(self.among[n]))
        while len(self._free) < len(missing):
            self._free.append(self._slots.popitem(last=False)[1])
        for part in self._parts(missing):
            slots = [self._free.pop() for _ in part]
            at = torch.tensor(slots, device=self.device)
            kv, bias = self._write(part)
            self._kv.index_copy_(0, at, kv)
            if self.refit:
                self._bias.index_copy_(0, at, bias)
            length = [min(self.net.memory.tokens, len(self.among[n]), self.net.memory.span) for n in part]
            self._length.index_copy_(0, at, torch.tensor(length, dtype=torch.int32, device=self.device))
            self._slots.update(zip(part, slots, strict=True))
        return Loaded({n: self._slots[n] for n in wanted}, self._kv, self._length, self._bias)

    def _make_room(self, wanted: int) -> None:
        """Slots for all that is wanted at once; what lies in an arena that is too small is forgotten."""
        shape = self.net.memory.record_shape(self.net.config)
        count = max(wanted, min(len(self.among), self._bytes // self._size), 1)
        if self._kv is not None and len(self._kv) >= wanted:
            return
        self._kv = self._bias = None
        self._kv = torch.empty((count, *shape), dtype=self.net.embed.dtype, device=self.device)
        self._length = torch.zeros(count, dtype=torch.int32, device=self.device)
        if self.refit:
            self._bias = torch.zeros((count, shape[0], *shape[2:4]), device=self.device)
        self._slots.clear()
        self._free = list(range(count))

    def _parts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Of ascending length, as many as fit into one forward pass."""
        rows, out = ROWS[self.device.type], []
        most = REFITTED[self.device.type] if self.refit else max(1, PART_BYTES[self.device.type] // self._size)
        for n in numbers:
            if not out or len(out[-1]) == most or (len(out[-1]) + 1) * len(self.among[n]) > rows:
                out.append([])
            out[-1].append(n)
        return out

    def _write(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        net, memory = self.net, self.net.memory
        if self._plain is not None:
            loaded = self._plain(numbers)
            at = torch.tensor([loaded.slot[n] for n in numbers], device=self.device)
            return self._made_of(loaded.kv, at), None
        references = [self.among[n][: memory.span] for n in numbers]
        kv, pos = encode_references(net, memory, self._prefix, references)
        return refitted(net, self._prefix, references, kv, pos, self.refit) if self.refit else (kv, None)

    @cached_property
    def _prefix(self) -> Prefix:
        return self.net.encode_prefix(self.net.memory.prefix_ids, self.net.memory.span)

    def _made_of(self, arena: Tensor, at: Tensor) -> Tensor:
        """Layers and heads of this configuration, through the codec."""
        net, memory = self.net, self.net.memory
        whole = self._plain.net.memory
        if memory.layers == whole.layers and memory.head_map == whole.head_map:
            kv = arena.index_select(0, at)
        else:
            heads = [memory.kv_heads(i, net.config.n_kv_heads) for i in range(len(memory.layers))]
            kv = torch.stack(
                [arena[at, whole.layers.index(x)][:, :, h] for x, h in zip(memory.layers, heads, strict=True)], 1
            )
        if self.codec is None:
            return kv
        if needed(self.device):
            return through(self.codec, kv)
        layers, _, heads, tokens, dim = kv.shape[1:]
        return self.codec.decode(self.codec.encode(kv), Layout(layers, heads, tokens, dim, kv.dtype))


@torch.no_grad()
def refitted(
    net: Llama, prefix: Prefix, references: Sequence[Sequence[int]], kv: Tensor, pos: Tensor, what: str
) -> tuple[Tensor, Tensor]:
    """Memories with biases and values fitted to what the references' own queries would read from all their tokens.

    kv [N, Lm, 2, Hm, K, D] and pos [N, Lm, Hm, K] as encode_references gives them; what: "bias", "value" or "both".
    Returns the new kv, and biases fp32 [N, Lm, Hm, K].
    """
    memory, device, config = net.memory, net.embed.device, net.config
    group = config.n_heads // config.n_kv_heads
    counts = torch.tensor([len(r) for r in references], device=device)
    longest = max(map(len, references))
    there = torch.arange(longest, device=device) < counts[:, None]
    asks = there[:, None, :, None].expand(-1, 1, -1, group).flatten(2)  # queries lie as [T, group]
    rows = there.flatten().nonzero()[:, 0]
    new, biases = kv.clone(), torch.zeros(pos.shape, device=device)

    def padded(x: Tensor, heads: Sequence[int]) -> Tensor:
        """[T, H, ...] packed -> [N, heads, longest, ...]."""
        out = x.new_zeros((len(references) * longest, len(heads), *x.shape[2:]))
        return out.index_copy_(0, rows, x[:, heads]).unflatten(0, (-1, longest)).transpose(1, 2)

    def fit(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer not in memory.layers:
            return
        index = memory.layers.index(layer)
        heads = memory.kv_heads(index, config.n_kv_heads)
        queries = padded(net.rope.shift(q, memory.span).unflatten(1, (-1, group)), heads).flatten(2, 3)
        keys, values = padded(k, heads), padded(v, heads)
        live = pos[:, index] >= 0
        kept, old = kv[:, index, 0], kv[:, index, 1]
        valid = live.sum(-1)
        fits = (valid > 0) & (valid < counts[:, None])  # nothing kept, or nothing left out: nothing to fit
        masks = {"there": there[:, None], "asks": asks, "live": live}
        bias = torch.zeros(live.shape, device=device)
        if what != "value":
            bias = mass_bias(queries, keys, kept, net.scale, **masks)
            bias = bias.where(fits[..., None] & live, 0)
        if what != "bias":
            fitted = refit_values(queries, keys, values, kept, old, bias, net.scale, **masks)
            new[:, index, 1] = torch.where(fits[..., None, None] & live[..., None], fitted.to(kv.dtype), old)
        biases[:, index] = bias

    trace(net, prefix, references, fit)
    return new, biases


@torch.no_grad()
def trace(net: Llama, prefix: Prefix, references: Sequence[Sequence[int]], see) -> None:
    """see(layer, q, k, v) for every layer as references are written: rotated q [T, Hq, D], rotated k and plain v
    [T, Hkv, D], the rows of all references packed."""
    counts, m, device = [len(r) for r in references], prefix.k.shape[1], net.embed.device
    tokens = torch.tensor([t for r in references for t in r], device=device)
    cu = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    cu_k = cu + m * torch.arange(len(cu), dtype=torch.int32, device=device)
    take = with_prefix_rows(counts, m, device)
    longest = max(counts)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        see(layer, q, k, v)
        keys = torch.cat((prefix.k[layer], k)).index_select(0, take)
        values = torch.cat((prefix.v[layer], v)).index_select(0, take)
        return memory_attention(
            q, keys, values, cu, cu_k, cu, *net.memory_args(-1, None, len(counts)),
            scale=net.scale, max_q=longest, max_k=m + longest, max_chunk=longest,
        )[0]  # fmt: skip

    net._run(tokens, [m + i for n in counts for i in range(n)], attend)
