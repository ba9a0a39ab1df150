"""The chunk rule (Memory3, arXiv 2407.01178, section 3.1; what the paper leaves open is fixed here).

- prompt: every 64 tokens are their own query and read their own memories; a last piece of fewer than `min_query`
  tokens keeps the memories of the piece before it (the first piece of a first prompt always asks);
- generated: the first chunk inherits the last prompt chunk's memories; after every 64 generated tokens the old ones
  are dropped and those 64 tokens are the query for the next forward pass (Session.step).
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Prompt tokens [start, end) that read the same memories; `asks`: they are a query of their own."""

    start: int
    end: int
    asks: bool


def cut(tokens: int, chunk: int, min_query: int, has_previous: bool) -> list[Piece]:
    """Pieces of a prompt: 64 tokens each, the last maybe shorter and then maybe silent."""
    pieces = []
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        asks = end - start >= min(min_query, chunk) or (start == 0 and not has_previous)
        pieces.append(Piece(start, end, asks))
    return pieces
