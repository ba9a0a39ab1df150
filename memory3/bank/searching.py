"""Keeps a bank's vector index at the bank's generation."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from .format import check_embeddings, unpack_embedding
from .index import ADDED, VectorIndex
from .writing import last_log

if TYPE_CHECKING:
    from .store import Bank


class Searcher:
    """Loads, replays or rebuilds the index before a search; may be used from several threads."""

    def __init__(self, bank: Bank, kind: str):
        self._bank, self.kind = bank, kind
        self._guard = threading.Lock()
        self._index: VectorIndex | None = None
        self._seen = -1  # the bank's last transaction when the index was brought to its generation
        self._saved = -1

    def search(self, queries: Any, k: int) -> tuple[list[list[bytes]], list[list[float]]]:
        """See Bank.search."""
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        count, index = len(queries), self._index
        dim = self._bank.embedding_dim if index is None else index.dim
        if not count or dim is None:
            return [[] for _ in range(count)], [[] for _ in range(count)]
        rows = check_embeddings(queries, count)
        if rows.shape[1] != dim:
            raise ValueError(f"queries must be [Q, {dim}] for this bank, got {list(rows.shape)}; same embedder?")
        return self.fresh(dim).search(rows, k)

    def fresh(self, dim: int) -> VectorIndex:
        """The index, brought to the bank's generation."""
        with self._guard, self._bank.read() as txn:
            if self._index is not None and txn.id() == self._seen:
                return (
                    self._index
                )  # nothing was written since: state and log, which may be on the device, are left alone
            db = self._bank.env.db
            epoch, generation = bytes(txn.get(b"epoch", db=db("state"))).hex(), last_log(txn, db("log"))
            index = self._index
            if index is None:
                index = VectorIndex(dim, self.kind)
                if index.load(self._bank.path, epoch):
                    self._saved = index.generation
            stale = index.epoch != epoch or index.generation != generation
            if stale and (index.epoch != epoch or not self._replay(txn, index, generation)):
                index.build(*self._everything(txn, dim), epoch, generation)
            self._index, self._seen = index, txn.id()
            return index

    def save(self) -> None:
        """Write the cache file if it is behind; a folder that cannot be written is left alone."""
        index = self._index
        if index is not None and index.generation != self._saved and index.save(self._bank.path):
            self._saved = index.generation

    def _replay(self, txn: Any, index: VectorIndex, generation: int) -> bool:
        db = self._bank.env.db
        raw = txn.get(b"log_from", db=db("state"))
        first = struct.unpack(">Q", raw)[0] if raw is not None else 0
        if not first <= index.generation <= generation:
            return False
        last: dict[bytes, int] = {}
        with txn.cursor(db("log")) as cursor:
            found = cursor.set_range(struct.pack(">Q", index.generation + 1))
            while found:
                value = cursor.value()
                last[bytes(value[1:])] = value[0]
                found = cursor.next()
        added, vectors = [], []
        for key, what in last.items():
            raw = txn.get(key, db=db("embeddings")) if what == ADDED else None
            if raw is not None:
                added.append(key)
                vectors.append(unpack_embedding(key, raw, index.dim))
        rows = np.stack(vectors) if vectors else np.empty((0, index.dim), np.float32)
        # All touched ids leave first: one may have been deleted and added again with another embedding.
        return index.change(added, rows, list(last), generation)

    def _everything(self, txn: Any, dim: int) -> tuple[list[bytes], np.ndarray]:
        database = self._bank.env.db("embeddings")
        rows = np.empty((txn.stat(database)["entries"], dim), np.float32)
        ids: list[bytes] = []
        with txn.cursor(database) as cursor:
            for key, value in cursor:
                rows[len(ids)] = unpack_embedding(bytes(key), value, dim)
                ids.append(bytes(key))
        return ids, rows
