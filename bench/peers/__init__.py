"""What else a user could call: PEERS maps an op to functions that take its arguments and return a Peer.

The first of an op is the one its target is stated against. A function raises ValueError for arguments that its peer
cannot serve, and RuntimeError where what it needs is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import sdpa_concatenated, sdpa_explicit_mask, two_partial_attentions
from .peer import Peer

PEERS: dict[str, tuple[Callable[..., Peer], ...]] = {
    "memory_attention": (sdpa_explicit_mask, two_partial_attentions),
    "memory_decode": (sdpa_concatenated,),
}

__all__ = ["PEERS", "Peer"]
