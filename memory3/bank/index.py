"""FAISS cosine index over the embeddings: a cache that can always be rebuilt from the bank.

The bank keeps a log of additions and deletions, numbered from 1; the number of the last entry is the bank's
generation. An index remembers the generation it has seen and the bank's epoch. Behind: it replays the log. Another
epoch, or a file that fails its checksum: it is built again from the embeddings, silently.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .checksum import crc32

KINDS = ("auto", "flat", "hnsw", "ivf")
FLAT_UP_TO = 100_000
IVF_FROM = 2_500  # fewer vectors cannot train an inverted file: searched exactly, and as fast
AT_ONCE_FROM = 4  # queries of a search that are worth a matrix product
INDEX_FILE = "index.faiss"
_MAGIC = b"M3IX"
ADDED, DELETED = 1, 2


class VectorIndex:
    """Inner product on normalised vectors. kind: flat (exact), hnsw, ivf, or auto (flat up to 100k, then hnsw).

    All methods may be called from several threads. ids are 16-byte record ids.
    """

    def __init__(self, dim: int, kind: str = "auto"):
        if kind not in KINDS:
            raise ValueError(f"index must be one of {', '.join(KINDS)}, got {kind!r}")
        self.dim, self.kind = dim, kind
        self.epoch, self.generation = "", 0
        self._guard = threading.RLock()
        self._index: Any = None
        self._built_as = ""
        self._ids = np.empty((0, 16), np.uint8)
        self._used = 0
        self._row: dict[bytes, int] = {}
        self._dead: list[int] = []  # rows that an approximate index still holds and searches must skip
        self._built_size = 0

    def __len__(self) -> int:
        return len(self._row)

    @property
    def built_as(self) -> str:
        return self._built_as or "flat"

    def build(self, ids: list[bytes], vectors: np.ndarray, epoch: str, generation: int) -> None:
        """Start anew from ids and vectors fp32 [n, dim]."""
        with self._guard:
            self._built_as = self._wanted(len(ids))
            self._index = _make(self.dim, self._built_as, vectors)
            if len(ids):
                self._index.add(np.ascontiguousarray(vectors, np.float32))
            self._ids = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16).copy()
            self._used = len(ids)
            self._row = {key: row for row, key in enumerate(ids)}
            self._dead, self._built_size = [], len(ids)
            self.epoch, self.generation = epoch, generation

    def _wanted(self, count: int) -> str:
        if self.kind == "auto":
            return "flat" if count <= FLAT_UP_TO else "hnsw"
        return "flat" if self.kind == "ivf" and count < IVF_FROM else self.kind

    def change(self, added: list[bytes], vectors: np.ndarray, deleted: Iterable[bytes], generation: int) -> bool:
        """Apply changes. False: better built again (many deletions in an approximate index, or flat outgrown)."""
        with self._guard:
            if self._index is None or self._wanted(len(self) + len(added)) != self._built_as:
                return False
            rows = [self._row.pop(key) for key in deleted if key in self._row]
            if rows and self._built_as == "flat":
                self._drop(rows)
            else:
                self._dead += rows
            if len(self._dead) > max(64, self._used // 4):
                return False
            if self._built_as == "ivf" and len(self) + len(added) > 8 * self._built_size:
                return False  # too few lists for so many vectors
            fresh = [i for i, key in enumerate(added) if key not in self._row]
            if fresh:
                self._append([added[i] for i in fresh], np.ascontiguousarray(vectors[fresh], np.float32))
            self.generation = generation
            return True

    def _append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self._index.add(vectors)
        end = self._used + len(keys)
        if end > len(self._ids):
            grown = np.empty((max(end, 2 * len(self._ids), 1024), 16), np.uint8)
            grown[: self._used] = self._ids[: self._used]
            self._ids = grown
        self._ids[self._used : end] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        self._row.update({key: self._used + i for i, key in enumerate(keys)})
        self._used = end

    def _drop(self, rows: list[int]) -> None:
        self._index.remove_ids(np.asarray(rows, np.int64))
        keep = np.ones(self._used, bool)
        keep[rows] = False
        self._ids = self._ids[: self._used][keep]
        self._used = len(self._ids)
        self._row = {key.tobytes(): row for row, key in enumerate(self._ids)}

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[bytes]], list[list[float]]]:
        """Best k ids and cosines per query fp32 [Q, dim], best first; fewer where the index holds fewer."""
        with self._guard:
            if not len(self) or not len(queries) or k == 0:
                return [[] for _ in queries], [[] for _ in queries]
            with _products_at_once(len(queries)):
                scores, rows = self._index.search(queries, min(k, len(self)), params=self._parameters())
            ids = [[self._ids[row].tobytes() for row in line if row >= 0] for line in rows]
            return ids, [line[: len(found)].tolist() for line, found in zip(scores, ids, strict=True)]

    def _parameters(self) -> Any:
        import faiss

        live = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._dead)) if self._dead else None
        if self._built_as == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=64, sel=live)
        if self._built_as == "ivf":
            return faiss.SearchParametersIVF(nprobe=max(8, self._index.nlist // 16), sel=live)
        return None

    def save(self, folder: Path) -> bool:
        """Write the cache file, whole or not at all. False where the folder cannot be written."""
        import faiss

        with self._guard:
            if self._index is None:
                return False
            body = faiss.serialize_index(self._index)
            live = np.zeros(self._used, np.uint8)
            live[list(self._row.values())] = 1
            about = {"epoch": self.epoch, "generation": self.generation, "dim": self.dim, "count": self._used,
                     "built_as": self._built_as, "bytes": int(body.nbytes)}  # fmt: skip
            head = json.dumps(about).encode()
            parts = [head, self._ids[: self._used].tobytes(), live.tobytes(), memoryview(body)]
        crc = 0
        for part in parts:
            crc = crc32(part, crc)
        temporary = folder / f".{INDEX_FILE}-{os.getpid()}-{threading.get_ident()}"
        try:
            with open(temporary, "wb") as file:
                file.write(_MAGIC + struct.pack("<II", len(head), crc))
                for part in parts:
                    file.write(part)
            os.replace(temporary, folder / INDEX_FILE)
        except OSError:
            _unlink(temporary)
            return False
        return True

    def load(self, folder: Path, epoch: str) -> bool:
        """Read the cache file. False when absent, damaged, of another epoch, dimension or kind."""
        import faiss

        try:
            raw = (folder / INDEX_FILE).read_bytes()
            size, crc = struct.unpack_from("<II", raw, 4)
            if raw[:4] != _MAGIC or crc32(memoryview(raw)[12:]) != crc:
                return False
            about = json.loads(raw[12 : 12 + size])
            count, at = int(about["count"]), 12 + size
            good = about["epoch"] == epoch and about["dim"] == self.dim
            if not good or about["built_as"] != self._wanted(count) or len(raw) != at + 17 * count + about["bytes"]:
                return False
            ids = np.frombuffer(raw, np.uint8, 16 * count, at).reshape(-1, 16).copy()
            live = np.frombuffer(raw, np.uint8, count, at + 16 * count)
            index = faiss.deserialize_index(np.frombuffer(raw, np.uint8, -1, at + 17 * count))
            if index.d != self.dim or index.ntotal != count:
                return False
        except (OSError, ValueError, KeyError, TypeError, struct.error, RuntimeError):
            return False
        with self._guard:
            self._index, self._built_as, self._ids, self._used = index, about["built_as"], ids, count
            self._row = {ids[row].tobytes(): int(row) for row in np.flatnonzero(live)}
            self._dead, self._built_size = np.flatnonzero(live == 0).tolist(), count
            self.epoch, self.generation = epoch, int(about["generation"])
        return True


def peek(folder: Path, epoch: str) -> dict[str, Any]:
    """built_as, generation and count of the cache file without loading it; None each where there is none."""
    try:
        with open(folder / INDEX_FILE, "rb") as file:
            head = file.read(12)
            about = json.loads(file.read(min(struct.unpack_from("<I", head, 4)[0], 1 << 16)))
        if head[:4] == _MAGIC and about["epoch"] == epoch:
            return {name: about[name] for name in ("built_as", "generation", "count")}
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        pass
    return {"built_as": None, "generation": None, "count": None}


@contextmanager
def _products_at_once(queries: int) -> Iterator[None]:
    """Several queries as one matrix product, which reads the vectors once: FAISS' default does so from 128,000 pairs on
    and else scans them query by query (8 queries of 20,000 vectors: 3.5 ms against 8.4, one thread).
    """
    import faiss

    before = faiss.cvar.distance_compute_blas_threshold
    if queries >= AT_ONCE_FROM:
        faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def _make(dim: int, kind: str, vectors: np.ndarray) -> Any:
    import faiss

    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        return index
    if kind == "ivf":
        lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
        index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(vectors, np.float32))
        return index
    return faiss.IndexFlatIP(dim)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
