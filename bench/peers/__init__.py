"""What else a user could call: PEERS maps an op to functions that take its arguments and return a Peer.

The first of an op is the one its target is stated against. A function raises ValueError for arguments that its peer
cannot serve, and RuntimeError where what it needs is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import compiled_flex_attention, sdpa_concatenated, sdpa_explicit_mask, two_partial_attentions
from .codec import faiss_bare_sa_decode, faiss_sa_decode
from .int8 import dynamic_int_mm
from .peer import Peer
from .rows import two_index_selects
from .select import matmul_softmax_topk

PEERS: dict[str, tuple[Callable[..., Peer], ...]] = {
    "gather_dequantize": (faiss_sa_decode, faiss_bare_sa_decode),
    "gather_memory": (two_index_selects,),
    "int8_linear": (dynamic_int_mm,),
    "memory_attention": (sdpa_explicit_mask, two_partial_attentions, compiled_flex_attention),
    "memory_decode": (sdpa_concatenated,),
    "select_tokens": (matmul_softmax_topk,),
    "vq_dequantize": (faiss_sa_decode, faiss_bare_sa_decode),
}

__all__ = ["PEERS", "Peer"]
