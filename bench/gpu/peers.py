"""What else a user of a GPU could call: functions that take an op's arguments and return a Peer (bench/peers).

Preparation (records copied beside the context, pages, masks) stays outside the timed call. A function raises ValueError
for arguments that its peer cannot serve, and RuntimeError where what it needs is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from ..peers import Peer
from ..peers.attention import plain_records, sdpa_concatenated
from ..peers.codec import faiss_sa_decode
from ..peers.select import matmul_softmax_topk

PAGE = 16
FLASHINFER_DIMS = (64, 128, 256)


def _need(module: str, package: str):
    """Raises RuntimeError where it is not installed, or something that it needs."""
    try:
        return import_module(module)
    except ImportError as error:
        lacks = "" if error.name == module else f" ({error})"
        raise RuntimeError(f"{module} is not installed: pip install {package}{lacks}") from error


def beside_context(name, k_cache, v_cache, kv_len, block_table, mem_k, mem_v, mem_slot, mem_len) -> list[Tensor]:
    """Keys and values [B, memory + context, Hkv, D], contiguous, of sequences and records that are all full.

    Raises:
        ValueError: they are not.
    """
    full = bool((kv_len == k_cache.shape[1]).all() and (mem_slot >= 0).all() and (mem_len == mem_k.shape[2]).all())
    if block_table is not None or not full:
        raise ValueError(f"{name}: expected a dense, full cache and full records")
    sides = []
    for cache, records in ((k_cache, mem_k), (v_cache, mem_v)):
        memory = records[mem_slot.long()].transpose(2, 3).flatten(1, 2)  # [B, R, K, Hm, D] -> [B, R K, Hm, D]
        sides.append(torch.cat([memory, cache], dim=1))
    return sides


def flash_attn_kvcache(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
) -> Peer:  # fmt: skip
    """memory_decode's peer: flash_attn_with_kvcache on records and context in one cache."""
    plain_records("flash_attn_kvcache", mem_bias, head_map)
    flash_attn = _need("flash_attn", "flash-attn")
    keys, values = beside_context(
        "flash_attn_kvcache", k_cache, v_cache, kv_len, block_table, mem_k, mem_v, mem_slot, mem_len
    )
    query = q.view(kv_len.shape[0], -1, *q.shape[1:])
    lengths = torch.full_like(kv_len, keys.shape[1])

    def call() -> Tensor:
        return flash_attn.flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=lengths, softmax_scale=scale, causal=True
        )

    return Peer(call, lambda out: out.view(q.shape), (query, keys, values))


def flashinfer_paged(*args, **kwargs) -> Peer:
    """memory_decode's peer: FlashInfer's batch decoding over pages that hold records and context, on CUDA cores."""
    return _flashinfer("flashinfer_paged", False, *args, **kwargs)


def flashinfer_tensor_cores(*args, **kwargs) -> Peer:
    """The same on tensor cores, which FlashInfer advises for several query heads per KV head."""
    return _flashinfer("flashinfer_tensor_cores", True, *args, **kwargs)


def _flashinfer(
    name, tensor_cores, q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None,
    head_map=None, *, scale, max_q, max_kv,
) -> Peer:  # fmt: skip
    """Raises ValueError for more than one new token per sequence, and other head dimensions than FlashInfer's."""
    plain_records(name, mem_bias, head_map)
    flashinfer = _need("flashinfer", "flashinfer-python")
    keys, values = beside_context(name, k_cache, v_cache, kv_len, block_table, mem_k, mem_v, mem_slot, mem_len)
    batch, tokens, heads, dim = keys.shape
    if max_q != 1:
        raise ValueError(f"{name}: expected one new token per sequence, got {max_q}")
    if dim not in FLASHINFER_DIMS:
        raise ValueError(f"{name}: expected a head dimension in {FLASHINFER_DIMS}, got {dim}")
    count = -(-tokens // PAGE)
    sides = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * PAGE - tokens)) for x in (keys, values)]
    pages = tuple(x.reshape(batch * count, PAGE, heads, dim) for x in sides)
    index = torch.arange(batch * count, dtype=torch.int32, device=q.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * count
    last = torch.full((batch,), tokens - (count - 1) * PAGE, dtype=torch.int32, device=q.device)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(
        starts, index, last, q.shape[1], heads, dim, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale
    )
    return Peer(lambda: wrapper.run(q, pages), lambda out: out, (q, *pages))


def flex_decode(
    q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_kv,
) -> Peer:  # fmt: skip
    """memory_decode's peer: FlexAttention without a mask over records and context, compiled on a GPU."""
    plain_records("flex_decode", mem_bias, head_map)
    if max_q != 1:
        raise ValueError(f"flex_decode: expected one new token per sequence, got {max_q}")
    sides = beside_context("flex_decode", k_cache, v_cache, kv_len, block_table, mem_k, mem_v, mem_slot, mem_len)
    keys, values = (x.transpose(1, 2).contiguous() for x in sides)
    query, attend = q.unsqueeze(2), _flex(q)
    return Peer(
        lambda: attend(query, keys, values, scale=scale, enable_gqa=True),
        lambda out: out.squeeze(2),
        (query, keys, values),
    )


def _flex(q: Tensor) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention


def flex_attention(
    q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias=None, head_map=None, *,
    scale, max_q, max_k, max_chunk,
) -> Peer:  # fmt: skip
    """memory_attention's peer: FlexAttention over all chunks' records and the context, with a block mask.

    Raises:
        ValueError: sequences or chunks of several lengths, or records that are not full.
    """
    plain_records("flex_attention", mem_bias, head_map)
    batch, chunks, tokens = len(cu_q) - 1, mem_slot.shape[0], mem_slot.shape[1] * mem_k.shape[2]
    whole = k is not None and bool((cu_q == cu_k).all() and (cu_q.diff() == max_q).all())
    if not whole or not bool((cu_chunk.diff() == max_chunk).all() and (mem_slot >= 0).all()) or max_q % max_chunk:
        raise ValueError("flex_attention: expected sequences of one length and chunks of one length")
    if not bool((mem_len == mem_k.shape[2]).all()):
        raise ValueError("flex_attention: expected full records")
    from torch.nn.attention.flex_attention import create_block_mask

    per = chunks // batch
    memory = per * tokens
    sides = []
    for context, records in ((k, mem_k), (v, mem_v)):
        gathered = records[mem_slot.long()].transpose(2, 3).reshape(batch, memory, *records.shape[1::2])
        sides.append(torch.cat([gathered, context.view(batch, max_q, *context.shape[1:])], dim=1).transpose(1, 2))
    keys, values = (x.contiguous() for x in sides)
    query = q.view(batch, max_q, *q.shape[1:]).transpose(1, 2).contiguous()

    def visible(b, h, row, column):
        return torch.where(column < memory, column // tokens == row // max_chunk, column - memory <= row)

    mask = create_block_mask(visible, None, None, max_q, memory + max_q, device=q.device)
    attend = _flex(q)
    return Peer(
        lambda: attend(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True),
        lambda out: out.transpose(1, 2).reshape(q.shape),
        (query, keys, values),
    )


def faiss_and_copy(codes: Tensor, *args: Tensor | None, tokens: int | None = None, dtype: torch.dtype) -> Peer:
    """The dequantising ops' peer: FAISS decodes on the CPU, the result is copied to the GPU as `dtype`."""
    on_cpu = (None if a is None else a.cpu() for a in args)
    peer = faiss_sa_decode(codes.cpu(), *on_cpu, tokens=tokens, dtype=dtype)
    return Peer(lambda: peer.result(peer.call()).to(codes.device, dtype), lambda out: out, peer.operands)


PEERS: dict[str, tuple[Callable[..., Peer], ...]] = {
    "gather_dequantize": (faiss_and_copy,),
    "memory_attention": (flex_attention,),
    "memory_decode": (flash_attn_kvcache, flashinfer_paged, flashinfer_tensor_cores, sdpa_concatenated, flex_decode),
    "select_tokens": (matmul_softmax_topk,),
    "vq_dequantize": (faiss_and_copy,),
}
