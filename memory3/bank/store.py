"""The bank: references, their embeddings and their memories in one folder."""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..identity import Identity
from ..memory import Memory
from . import reading, report, writing
from .ahead import announce
from .codec import Codec
from .env import DATA_FILE, Environment
from .errors import BankError, BankNotFound, IdentityMismatch, UnknownRecord
from .format import Layout, Reference, unpack_embedding, unpack_reference
from .header import create_folder, read_identity, require_match
from .index import KINDS, VectorIndex
from .locks import WriterLock
from .report import RecordInfo
from .searching import Searcher
from .writing import Encode

MAP_BYTES = 1 << 30


class Bank:
    """Made by `Bank.create` or `Bank.open`; a context manager. Reading may happen on any thread.

    identity   who wrote the records (model, tokenizer, shapes, codec, embedder)
    layout     shape of a record; codec: the codebooks of a coded bank, else None
    """

    def __init__(self, env: Environment, lock: WriterLock | None, index: str):
        self._environment: Environment | None = env
        self._lock = lock
        self.path = env.folder
        self._epoch = env.epoch
        self._searcher = Searcher(self, index)
        self.unsaved: OrderedDict[bytes, bytes] = OrderedDict()  # records of a read-only bank's cold references
        try:
            with self.read() as txn:
                header = txn.get(b"identity", db=env.db("header"))
                self.identity = read_identity(self.path, None if header is None else bytes(header))
                raw = txn.get(b"codec", db=env.db("header"))
                self.codec = None if raw is None else Codec.from_bytes(bytes(raw))
            have = self.codec.name if self.codec else "dense"
            if have != self.identity.codec:
                raise IdentityMismatch(self.path, [("codec (hash of the books)", have, self.identity.codec)])
            self.layout = Layout.of(self.identity, self.codec.code_bytes if self.codec else None)
        except BaseException:
            self.close()
            raise

    @property
    def env(self) -> Environment:
        """The shared LMDB environment. Raises BankError after close."""
        if self._environment is None:
            raise BankError(f"the bank {self.path} is closed; open it again")
        return self._environment

    @property
    def writable(self) -> bool:
        return self._lock is not None

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A read transaction; its values are LMDB memory and die with the block. Do not nest or write inside."""
        with self.env.read() as txn:
            if self.env.epoch != self._epoch:
                raise BankError(f"the bank {self.path} was replaced by another one; open it again")
            yield txn

    # ---- create, open, close -----------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], identity: Identity, *, codec: Codec | None = None, index: str = "auto",
        map_bytes: int = MAP_BYTES, max_bytes: int | None = None,
    ) -> Bank:  # fmt: skip
        """A new, empty bank, open for writing. The folder appears whole or not at all.

        identity   its codec field is replaced by the codec's name ("dense" without one)
        index      "auto", "flat", "hnsw" or "ivf"
        map_bytes  first size of the memory map; it grows by itself, up to max_bytes where given
        Raises BankExists, BankFull, ValueError (identity does not describe a record).
        """
        folder = Path(path).resolve()
        create_folder(folder, identity, codec, map_bytes)
        return cls.open(folder, write=True, index=index, max_bytes=max_bytes)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], identity: Identity | None = None, *, write: bool = False,
        index: str = "auto", max_bytes: int | None = None,
    ) -> Bank:  # fmt: skip
        """Open a bank; with `identity`, only if it was written for the same (see `check`).

        Any number of readers, one writer. Raises BankNotFound, BankTruncated, BankLocked, IdentityMismatch.
        """
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise BankNotFound(f"no bank at {folder} (no such folder); Bank.create or `memory3 write` makes one")
        if not (folder / DATA_FILE).is_file():
            raise BankNotFound(f"no bank at {folder} ({DATA_FILE} is missing); Bank.create makes one")
        if index not in KINDS:
            raise ValueError(f"index must be one of {', '.join(KINDS)}, got {index!r}")
        lock = WriterLock(folder) if write else None
        try:
            env = Environment.acquire(folder, write)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        bank = cls(env, lock, index)  # from here on the bank owns both
        try:
            if write:
                env.max_bytes = max_bytes
            if identity is not None:
                bank.check(identity)
        except BaseException:
            bank.close()
            raise
        return bank

    def close(self) -> None:
        """Write the index cache, let go of the file and the writer's lock. Closing twice is fine."""
        env = self._environment
        if env is None:
            return
        try:
            self._searcher.save()
        finally:
            self._environment = None
            env.release()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter is going down
            return

    def __repr__(self) -> str:
        state = "closed" if self._environment is None else ("writing" if self._lock else "reading")
        return f"Bank({str(self.path)!r}, {state})"

    def check(self, identity: Identity) -> None:
        """Raise IdentityMismatch naming each field that differs.

        An empty embedder, and the codec "dense", ask for nothing: coded records are decoded on the way.
        """
        require_match(self.path, self.identity, identity)

    # ---- what is in it -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """References, warm and cold."""
        with self.read() as txn:
            return int(txn.stat(self.env.db("references"))["entries"])

    def __contains__(self, record_id: bytes) -> bool:
        return self.has(record_id)

    def has(self, record_id: bytes) -> bool:
        """Whether the reference is registered, warm or cold."""
        with self.read() as txn:
            return txn.get(record_id, db=self.env.db("references")) is not None

    def is_cold(self, record_id: bytes) -> bool:
        """Whether the reference is registered but its memory is not written yet."""
        return bool(self.cold([record_id]))

    def cold(self, ids: Sequence[bytes]) -> list[bytes]:
        """Those of `ids` that have no record. Raises UnknownRecord for an id without a reference."""
        if len(ids):
            announce(self.env.data_path, "records", ids)  # who asks will read them
        with self.read() as txn:
            missing = [i for i in ids if txn.get(i, db=self.env.db("records")) is None]
            for i in missing:
                if txn.get(i, db=self.env.db("references")) is None:
                    raise UnknownRecord(i, self.path)
        return missing

    def missing(self, ids: Sequence[bytes], cold: bool = False) -> list[bytes]:
        """Those of `ids` without a record; with `cold`, those without a reference. Unknown ids count as missing."""
        with self.read() as txn:
            table = self.env.db("references" if cold else "records")
            return [i for i in ids if txn.get(i, db=table) is None]

    def ids(self) -> Iterator[bytes]:
        """All ids, ascending; read in portions, so the bank may change meanwhile."""
        last = b""
        while True:
            with self.read() as txn, txn.cursor(self.env.db("references")) as cursor:
                found = cursor.set_range(last + b"\0") if last else cursor.first()
                keys: list[bytes] = []
                while found and len(keys) < 4096:
                    keys.append(bytes(cursor.key()))
                    found = cursor.next()
            yield from keys
            if not found or not keys:
                return
            last = keys[-1]

    def record_id(self, token_ids: Sequence[int]) -> bytes:
        """The id that a reference with these tokens has in this bank."""
        return self.identity.record_id(token_ids)

    def reference(self, record_id: bytes) -> Reference:
        """Text, token ids, title and source."""
        with self.read() as txn:
            raw = txn.get(record_id, db=self.env.db("references"))
            if raw is None:
                raise UnknownRecord(record_id, self.path)
            return unpack_reference(record_id, raw)

    def text(self, record_id: bytes) -> str:
        return self.reference(record_id).text

    def token_ids(self, record_id: bytes) -> list[int]:
        return self.reference(record_id).token_ids

    def embedding(self, record_id: bytes) -> np.ndarray:
        """fp32 [E], length 1."""
        with self.read() as txn:
            raw = txn.get(record_id, db=self.env.db("embeddings"))
            if raw is None:
                raise UnknownRecord(record_id, self.path)
            return unpack_embedding(record_id, raw).copy()

    @property
    def has_bias(self) -> bool:
        """Whether a record with a bias was ever added: the arena then needs a bias plane."""
        with self.read() as txn:
            return txn.get(b"has_bias", db=self.env.db("state")) is not None

    @property
    def embedding_dim(self) -> int | None:
        """E, None while nothing was added."""
        with self.read() as txn:
            raw = txn.get(b"embedding_dim", db=self.env.db("state"))
            return None if raw is None else struct.unpack("<I", raw)[0]

    @property
    def generation(self) -> int:
        """Grows with every addition and deletion."""
        with self.read() as txn:
            return writing.last_log(txn, self.env.db("log"))

    # ---- writing -----------------------------------------------------------------------------------------------

    def add(
        self, memories: Sequence[Memory], embeddings: Any, titles: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list[bytes]:  # fmt: skip
        """Store memories with their embeddings [N, E] (scaled to length 1); returns their ids.

        An id that has a record already is left as it is. Memories must carry token_ids: ids are made from them.
        Committed in batches. Raises ValueError, BankFull, BankReadOnly.
        """
        for i, memory in enumerate(memories):
            if not memory.token_ids:
                raise ValueError(f"memories[{i}] has no token_ids; set them, the record's id is made from them")
        texts, tokens = [m.text for m in memories], [m.token_ids for m in memories]
        return writing.add(self, writing.make_references(self, texts, tokens, titles, sources), embeddings, memories)

    def add_cold(
        self, texts: Sequence[str], token_ids: Sequence[Sequence[int]], embeddings: Any,
        titles: Sequence[str] | None = None, sources: Sequence[str] | None = None,
    ) -> list[bytes]:  # fmt: skip
        """Register references without memories; they are found by search and written at first use (`ensure`)."""
        if len(texts) != len(token_ids):
            raise ValueError(f"token_ids must have one list per text ({len(texts)}), got {len(token_ids)}")
        empty = [i for i, ids in enumerate(token_ids) if not len(ids)]
        if empty:
            raise ValueError(f"token_ids[{empty[0]}] is empty; a reference needs at least one token")
        return writing.add(self, writing.make_references(self, texts, token_ids, titles, sources), embeddings, None)

    def ensure(self, ids: Sequence[bytes], encode: Encode) -> int:
        """Write the memories of those `ids` that are cold, by encode(list of token ids); returns how many.

        A bank opened for reading keeps the last few of them in RAM instead, for read_into. Raises UnknownRecord.
        """
        return writing.ensure(self, ids, encode)

    def delete(self, ids: Iterable[bytes]) -> int:
        """Remove references with their records; returns how many were there. `compact` gives the space back."""
        return writing.delete(self, ids)

    def compact(self) -> int:
        """Rewrite the file without free pages and swap it in atomically; returns the bytes given back.

        Needs room for the copy. Readers in other processes keep the old file until their next call.
        """
        return writing.compact(self)

    # ---- reading -----------------------------------------------------------------------------------------------

    def get(self, ids: Sequence[bytes]) -> list[Memory]:
        """Memories by id, copied out; coded ones are decoded. Raises UnknownRecord, ColdRecord, RecordCorrupt."""
        return reading.get_memories(self, ids)

    def read_into(
        self, ids: Sequence[bytes], kv: Tensor, length: Tensor, slots: Sequence[int] | Tensor,
        bias: Tensor | None = None,
    ) -> int:  # fmt: skip
        """Copy records into rows `slots` of an arena, checksums verified; returns the record bytes read.

        kv      [S, Lm, 2, Hm, K, D], the bank's dtype (any float dtype for a coded bank), CPU or another device
        length  int32 [S], gets n_valid
        bias    fp32 [S, Lm, Hm, K]; needed as soon as a record has one (zeros where a record has none)
        Raises UnknownRecord, ColdRecord (call `ensure` first), RecordCorrupt; ValueError for a wrong shape or slot.
        """
        return reading.copy_records(self, ids, kv, length, slots, bias)

    def read_codes_into(
        self, ids: Sequence[bytes], codes: Tensor, length: Tensor, slots: Sequence[int] | Tensor,
        bias: Tensor | None = None,
    ) -> int:  # fmt: skip
        """As read_into, for a coded bank and an arena of codes, uint8 [S, Lm, 2, Hm, G]."""
        return reading.copy_codes(self, ids, codes, length, slots, bias)

    def inspect(self, record_id: bytes) -> RecordInfo:
        """Reference, size and kept positions of one id. Raises UnknownRecord, RecordCorrupt."""
        return report.inspect(self, record_id)

    def search(self, queries: Any, k: int) -> tuple[list[list[bytes]], list[list[float]]]:
        """Best k ids and cosines for each query fp32 [Q, E], best first (fewer in a smaller bank)."""
        return self._searcher.search(queries, k)

    def build_index(self) -> VectorIndex | None:
        """Bring the index up to date and write its cache file now; None for a bank without embeddings."""
        dim = self.embedding_dim
        if dim is None:
            return None
        index = self._searcher.fresh(dim)
        self._searcher.save()
        return index

    # ---- whole bank --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts, bytes, identity and the state of the index; plain JSON types."""
        return report.stats(self)

    def digest(self) -> str:
        """SHA-256 over identity and every id, reference, embedding and record: equal for equal content."""
        return report.digest(self)

    def verify(self) -> list[tuple[bytes, str]]:
        """Check every value of the bank; (id, what is wrong) of those that fail."""
        return report.verify(self)

    def export(self, file: str | os.PathLike[str]) -> int:
        """Write everything into one file that holds no code (see transfer.py); returns the references written."""
        from .transfer import export_bank

        return export_bank(self, Path(file))

    @staticmethod
    def import_(file: str | os.PathLike[str], path: str | os.PathLike[str], identity: Identity | None = None) -> Bank:
        """A bank from an exported file, open for writing; goes on where an interrupted import stopped."""
        from .transfer import import_bank

        return import_bank(Path(file), Path(path), identity)

    @staticmethod
    def salvage(
        path: str | os.PathLike[str],
        target: str | os.PathLike[str],
        identity: Identity | None = None,
        embed: Any = None,
    ) -> Any:
        """Copy what is whole in a damaged bank to a new one; see memory3.bank.salvage for the report."""
        from .salvage import salvage

        return salvage(Path(path), Path(target), identity, embed)
