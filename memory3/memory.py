"""What is written and read: one explicit memory, and the set of memories that a model call reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import MemoryConfig, ModelConfig


@dataclass
class Memory:
    """One reference as sparse key-values (Memory3, arXiv 2407.01178, section 3.2).

    kv         [Lm, 2, Hm, K, D], the model's dtype, contiguous, CPU; plane 0 keys after RoPE at position
               m + pos, plane 1 values; tokens ascending by position; rows >= n_valid are zero
    pos        int32 [Lm, Hm, K], 0-based position within the reference, -1 none or unknown (made by hand)
    n_valid    valid tokens per head, the same for all heads
    token_ids  the reference's tokens, without the prefix; text: the reference's text (both may be empty)
    bias       fp32 [Lm, Hm, K] added to the scores (natural log), or None
    """

    kv: Tensor
    pos: Tensor | None = None
    n_valid: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kv, Tensor) or self.kv.dim() != 5 or self.kv.shape[1] != 2:
            got = tuple(self.kv.shape) if isinstance(self.kv, Tensor) else type(self.kv).__name__
            raise ValueError(f"kv must be a tensor [layers, 2, heads, tokens, head_dim], got {got}")
        layers, _, heads, tokens, _ = self.kv.shape
        if self.n_valid is None:
            self.n_valid = tokens
        if not 0 <= self.n_valid <= tokens:
            raise ValueError(f"n_valid must be in 0..{tokens} (the tokens of kv), got {self.n_valid}")
        self.kv = self.kv.contiguous()
        if self.pos is None:
            self.pos = torch.full((layers, heads, tokens), -1, dtype=torch.int32)
        for name, dtype in (("pos", torch.int32), ("bias", torch.float32)):
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != (layers, heads, tokens):
                want = (layers, heads, tokens)
                raise ValueError(f"{name} must be [layers, heads, tokens] = {want}, got {tuple(value.shape)}")
            setattr(self, name, value.to(dtype).contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of key-values (and bias) that reading this memory moves."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.kv.numel() * self.kv.element_size() + bias

    def check(self, model: ModelConfig, memory: MemoryConfig, dtype: torch.dtype) -> None:
        """Raise ValueError naming the first thing that does not fit this model."""
        names = ("memory layers", "planes", "record heads", "tokens", "head_dim")
        want = memory.record_shape(model)
        for name, mine, theirs in zip(names, self.kv.shape, want, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"memory kv {tuple(self.kv.shape)} has {mine} {name}, the model reads {theirs} "
                    f"(kv {want}); write it with this model's memory configuration, or pad tokens and set n_valid"
                )
        if self.kv.dtype != dtype:
            raise ValueError(f"memory kv must have the model's dtype {dtype}, got {self.kv.dtype}; use kv.to(dtype)")


@dataclass
class MemoryRead:
    """The memories that one model call reads; tensors live on the model's device.

    kv            [S, Lm, 2, Hm, K, D], the arena, the model's dtype
    length        int32 [S], valid tokens of each slot
    slots         int32 [C, R], -1 none; C chunks at prefill, C = batch at decode
    cu_chunk      int32 [C + 1], query rows of each chunk (prefill and packed forward only)
    bias          fp32 [S, Lm, Hm, K] or None
    collect_mass  fill `mass` in the next call
    mass          fp32 [rows, R], attention mass on each memory, mean over memory layers and query heads
    """

    kv: Tensor
    length: Tensor
    slots: Tensor
    cu_chunk: Tensor | None = None
    bias: Tensor | None = None
    collect_mass: bool = False
    mass: Tensor | None = None


def stack_memories(
    memories: Sequence[Memory], model: ModelConfig, memory: MemoryConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A small arena that holds just these memories, memory i in slot i.

    Returns kv [S, Lm, 2, Hm, K, D], length int32 [S], bias fp32 [S, Lm, Hm, K] or None where none has one.
    Raises ValueError naming the memory and the field that does not fit.
    """
    shape = memory.record_shape(model)
    if not memories:
        return torch.empty((0, *shape), dtype=dtype), torch.empty(0, dtype=torch.int32), None
    for i, item in enumerate(memories):
        if not isinstance(item, Memory):
            raise TypeError(f"memories[{i}] must be a Memory (model.write(text) makes one), got {type(item).__name__}")
        try:
            item.check(model, memory, dtype)
        except ValueError as error:
            raise ValueError(f"memories[{i}]: {error}") from None
    kv = torch.stack([item.kv for item in memories])
    length = torch.tensor([item.n_valid for item in memories], dtype=torch.int32)
    bias = None
    if any(item.bias is not None for item in memories):
        zeros = torch.zeros((shape[0], shape[2], shape[3]), dtype=torch.float32)
        bias = torch.stack([zeros if item.bias is None else item.bias for item in memories])
    return kv, length, bias
