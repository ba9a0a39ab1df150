"""What is in a bank: per id, in numbers, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import BankError, UnknownRecord
from .format import Reference, read_head, unpack_embedding, unpack_record, unpack_reference
from .index import peek

if TYPE_CHECKING:
    from .store import Bank


@dataclass(frozen=True)
class RecordInfo:
    """What `Bank.inspect` tells of one id. positions int32 [Lm, Hm, K] (-1 none), None while cold."""

    reference: Reference
    cold: bool
    n_valid: int = 0
    bytes: int = 0
    has_bias: bool = False
    positions: Tensor | None = None

    def kept(self, layer: int, head: int) -> list[int]:
        """Positions in the reference that this memory layer and record head keep."""
        return [] if self.positions is None else [p for p in self.positions[layer, head].tolist() if p >= 0]


def inspect(bank: Bank, record_id: bytes) -> RecordInfo:
    """See Bank.inspect."""
    with bank.read() as txn:
        raw = txn.get(record_id, db=bank.env.db("references"))
        if raw is None:
            raise UnknownRecord(record_id, bank.path)
        reference = unpack_reference(record_id, raw)
        value = txn.get(record_id, db=bank.env.db("records"))
        if value is None:
            return RecordInfo(reference, cold=True)
        record = unpack_record(record_id, value, bank.layout)
        return RecordInfo(reference, False, record.n_valid, len(value), record.bias is not None, record.pos)


def stats(bank: Bank) -> dict[str, Any]:
    """See Bank.stats."""
    tables, info = bank.env.stat(), bank.env.info()
    file = bank.env.data_path.stat()
    pages = {n: t["branch_pages"] + t["leaf_pages"] + t["overflow_pages"] for n, t in tables.items()}
    references, records = tables["references"]["entries"], tables["records"]["entries"]
    generation = bank.generation
    cache = peek(bank.path, bank.env.epoch.hex())
    return {
        "path": str(bank.path),
        "references": references,
        "records": records,
        "cold": references - records,
        "embeddings": tables["embeddings"]["entries"],
        "embedding_dim": bank.embedding_dim,
        "record_bytes": bank.layout.record_bytes,
        "kv_bytes": bank.layout.kv_bytes,
        "has_bias": bank.has_bias,
        "file_bytes": file.st_size,
        "disk_bytes": file.st_blocks * 512,
        "used_bytes": sum(pages.values()) * info["psize"],
        "bytes": {name: count * info["psize"] for name, count in pages.items()},
        "map_bytes": info["map_size"],
        "generation": generation,
        "index": {**cache, "up_to_date": cache["generation"] == generation},
        "identity": json.loads(bank.identity.to_json()),
    }


def digest(bank: Bank) -> str:
    """See Bank.digest."""
    state = hashlib.sha256(bank.identity.to_json().encode())
    with bank.read() as txn:
        for name in ("references", "embeddings", "records"):
            state.update(name.encode())
            with txn.cursor(bank.env.db(name)) as cursor:
                for key, value in cursor:
                    state.update(key)
                    state.update(value)
    return state.hexdigest()


def verify(bank: Bank) -> list[tuple[bytes, str]]:
    """See Bank.verify."""
    bad = []
    checks: dict[str, Callable[[bytes, Any], Any]] = {
        "references": unpack_reference,
        "embeddings": unpack_embedding,
        "records": lambda key, value: read_head(key, value, bank.layout),
    }
    with bank.read() as txn:
        for name, check in checks.items():
            with txn.cursor(bank.env.db(name)) as cursor:
                for key, value in cursor:
                    try:
                        check(bytes(key), value)
                    except BankError as error:
                        bad.append((bytes(key), str(error)))
    return bad
