"""memory_decode_coded: `_decode.decode_kernel` on codes, decoded in the basis they were coded in: the query is rotated
into it once, and the records' share of the output out of it."""

from __future__ import annotations

from torch import Tensor

from ..book import Book
from ..ops import _attention_args as checks
from ..ops.memory_decode import check_cache_values
from . import _decode, _launch


def call(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_len: Tensor, block_table: Tensor | None, cu_q: Tensor,
    mem_k_codes: Tensor, mem_v_codes: Tensor, mem_slot: Tensor, mem_len: Tensor, mem_bias: Tensor | None,
    head_map: Tensor | None, k_coarse: Tensor, k_fine: Tensor, k_rot: Tensor | None, v_coarse: Tensor, v_fine: Tensor,
    v_rot: Tensor | None, *, tokens: int, scale: float, max_q: int, max_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    records = (mem_k_codes, mem_v_codes, mem_slot, mem_len, mem_bias, head_map)
    args = (q, k_cache, v_cache, kv_len, block_table, cu_q, *records)
    books = Book(k_coarse, k_fine, k_rot), Book(v_coarse, v_fine, v_rot)
    sizes = {"tokens": tokens, "scale": scale, "max_q": max_q, "max_kv": max_kv}
    outputs = _launch.outputs("memory_decode_coded", *args, *books[0], *books[1], **sizes)
    if _launch.checks_values():
        check_cache_values(q, k_cache, kv_len, block_table, cu_q, max_q, max_kv)
        checks.check_slot_values(mem_slot, mem_len, tokens)
        checks.check_head_map(head_map, mem_k_codes.shape[1])
    _launch.run(_decode.launches(outputs, *args, *books, **sizes))
    return outputs
