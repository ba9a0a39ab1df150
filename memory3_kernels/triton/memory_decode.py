"""memory_decode: `_decode.decode_kernel` on dense records."""

from __future__ import annotations

from torch import Tensor

from ..ops import _attention_args as checks
from ..ops.memory_decode import check_cache_values
from . import _decode, _launch


def call(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_len: Tensor, block_table: Tensor | None, cu_q: Tensor,
    mem_k: Tensor, mem_v: Tensor, mem_slot: Tensor, mem_len: Tensor, mem_bias: Tensor | None = None,
    head_map: Tensor | None = None, *, scale: float, max_q: int, max_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    args = (q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)
    sizes = {"scale": scale, "max_q": max_q, "max_kv": max_kv}
    outputs = _launch.outputs("memory_decode", *args, **sizes)
    if _launch.checks_values():
        check_cache_values(q, k_cache, kv_len, block_table, cu_q, max_q, max_kv)
        checks.check_slot_values(mem_slot, mem_len, mem_k.shape[2])
        checks.check_head_map(head_map, mem_k.shape[1])
    _launch.run(_decode.launches(outputs, *args, None, None, tokens=mem_k.shape[2], **sizes))
    return outputs
