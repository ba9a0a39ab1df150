"""The paper's worst case (Memory3, section 7.5): no two retrievals of a run share a memory, and no cache helps."""

from __future__ import annotations

from functools import cached_property
from itertools import islice

from memory3 import Engine

from ..evict import evict

SPARES = 4096


class UniqueEngine(Engine):
    """After a search, memories that this run has read already are replaced by others of the bank.

    Call `restart` before each run: it forgets what was read, empties the slots and evicts the bank's pages.
    """

    def restart(self) -> None:
        self.arena.clear()
        evict(self.bank.path / "data.mdb")
        self._seen: set[bytes] = set()
        self._spare = iter(self._spares)

    @cached_property
    def _spares(self) -> list[bytes]:
        """Ids are hashes: the first ones are a random draw."""
        return list(islice(self.bank.ids(), SPARES))

    def search(self, queries, stats):
        found, scores, texts = super().search(queries, stats)
        return [[self._take(record) for record in row] for row in found], scores, texts

    def _take(self, record: bytes) -> bytes:
        if record in self._seen:
            record = next((spare for spare in self._spare if spare not in self._seen), None)
            if record is None:
                raise ValueError(f"bank: expected more references than a run reads, got {len(self.bank)}")
        self._seen.add(record)
        return record
