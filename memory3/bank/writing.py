"""Everything that changes a bank, one LMDB transaction per batch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import Memory
from .errors import BankReadOnly
from .format import Reference, check_embeddings, pack_embedding, pack_record, pack_reference
from .index import ADDED, DELETED

if TYPE_CHECKING:
    from .store import Bank

BATCH_BYTES = 32 << 20  # of values per transaction
KEEP_UNSAVED = 64  # memories of cold references that a read-only bank holds on to
Encode = Callable[[list[list[int]]], list[Memory]]


def need_writer(bank: Bank) -> None:
    if not bank.writable:
        raise BankReadOnly(f"the bank {bank.path} is open for reading; Bank.open(path, write=True) to change it")


def last_log(txn: Any, log: Any) -> int:
    """Number of the newest log entry: the bank's generation."""
    with txn.cursor(log) as cursor:
        return int(struct.unpack(">Q", cursor.key())[0]) if cursor.last() else 0


def make_references(
    bank: Bank, texts: Sequence[str], tokens: Sequence[Sequence[int]], titles: Sequence[str] | None,
    sources: Sequence[str] | None,
) -> list[Reference]:  # fmt: skip
    """Checked and with their ids."""
    columns: list[Sequence[str]] = []
    for name, values in (("titles", titles), ("sources", sources)):
        if values is not None and len(values) != len(texts):
            raise ValueError(f"{name} must have one entry per reference ({len(texts)}), got {len(values)}")
        columns.append(values if values is not None else [""] * len(texts))
    return [
        Reference(bank.record_id(ids), text, [int(t) for t in ids], title, source)
        for text, ids, title, source in zip(texts, tokens, *columns, strict=True)
    ]


def add(bank: Bank, references: list[Reference], embeddings: Any, memories: Sequence[Memory] | None) -> list[bytes]:
    """See Bank.add and Bank.add_cold."""
    need_writer(bank)
    rows = check_embeddings(embeddings, len(references))
    dim = bank.embedding_dim
    if len(rows) and dim is not None and rows.shape[1] != dim:
        raise ValueError(f"embeddings must be [{len(rows)}, {dim}] in this bank, got {list(rows.shape)}")
    each = 8192 + 4 * rows.shape[1] + (bank.layout.record_bytes if memories is not None else 0)
    step = max(1, BATCH_BYTES // each)
    for start in range(0, len(references), step):
        part = slice(start, start + step)
        records = None if memories is None else pack(bank, references[part], memories[part])
        biased = memories is not None and any(m.bias is not None for m in memories[part])
        ids = [r.id for r in references[part]]
        vectors = dict(zip(ids, rows[part], strict=True))
        add_packed(bank, references[part], vectors, dict(zip(ids, records or [], strict=False)), biased)
    return [r.id for r in references]


def pack(bank: Bank, references: Sequence[Reference], memories: Sequence[Memory]) -> list[bytes]:
    """Record values; coded where the bank has a codec. Raises ValueError naming the memory that does not fit."""
    packed, layout = [], bank.layout
    for i, (reference, memory) in enumerate(zip(references, memories, strict=True)):
        try:
            if tuple(memory.kv.shape) != layout.kv_shape or memory.kv.dtype != layout.dtype:
                want = f"{layout.dtype} {list(layout.kv_shape)}"
                raise ValueError(f"kv must be {want} for this bank, got {memory.kv.dtype} {list(memory.kv.shape)}")
            kv = bank.codec.encode(memory.kv.cpu()) if bank.codec else memory.kv
            n_valid = layout.tokens if memory.n_valid is None else memory.n_valid
            pos = memory.pos
            if pos is None:
                raise ValueError("pos must be int32 [layers, heads, tokens], got None")
            size = len(reference.token_ids)
            packed.append(pack_record(reference.id, layout, kv, pos, n_valid, size, memory.bias))
        except ValueError as error:
            raise ValueError(f"memories[{i}] ({reference.id.hex()}): {error}") from None
    return packed


def add_packed(
    bank: Bank,
    references: Sequence[Reference],
    vectors: dict[bytes, np.ndarray],
    records: dict[bytes, bytes],
    biased: bool = False,
) -> None:
    """One transaction of references with what there is of their embeddings (length 1) and packed records.

    What the bank has already stays as it is, and no id is put twice in one transaction.
    """
    need_writer(bank)
    db = bank.env.db
    values = {r.id: pack_reference(r) for r in references}
    size = sum(map(len, values.values())) + sum(map(len, records.values())) + 8192 * len(references)
    dims = {len(v) for v in vectors.values()}

    def work(txn: Any) -> None:
        log = last_log(txn, db("log"))
        for record_id, value in values.items():
            new = txn.put(record_id, value, db=db("references"), overwrite=False)
            if new and record_id in vectors:
                log += 1
                txn.put(struct.pack(">Q", log), bytes([ADDED]) + record_id, db=db("log"), append=True)
                txn.put(record_id, pack_embedding(record_id, vectors[record_id]), db=db("embeddings"))
            if record_id in records:
                txn.put(record_id, records[record_id], db=db("records"), overwrite=False)
        for dim in dims:
            txn.put(b"embedding_dim", struct.pack("<I", dim), db=db("state"))
        if biased:
            txn.put(b"has_bias", b"1", db=db("state"))

    bank.env.write(work, size)


def ensure(bank: Bank, ids: Sequence[bytes], encode: Encode) -> int:
    """See Bank.ensure."""
    wanted = list(dict.fromkeys(bank.cold(ids)))
    cold = [i for i in wanted if i not in bank.unsaved]
    step = max(1, BATCH_BYTES // bank.layout.record_bytes)
    for start in range(0, len(cold), step):
        references = [bank.reference(i) for i in cold[start : start + step]]
        memories = encode([r.token_ids for r in references])
        if len(memories) != len(references):
            raise ValueError(f"encode must return {len(references)} memories, got {len(memories)}")
        packed = pack(bank, references, memories)
        if bank.writable:
            _store_records(bank, references, packed, any(m.bias is not None for m in memories))
        else:
            bank.unsaved.update(zip((r.id for r in references), packed, strict=True))
    for i in wanted:  # what this call asked for is the last to go
        if i in bank.unsaved:
            bank.unsaved.move_to_end(i)
    while len(bank.unsaved) > max(KEEP_UNSAVED, len(wanted)):
        bank.unsaved.popitem(last=False)
    return len(cold)


def _store_records(bank: Bank, references: Sequence[Reference], packed: Sequence[bytes], biased: bool) -> None:
    db = bank.env.db

    def work(txn: Any) -> None:
        for reference, record in zip(references, packed, strict=True):
            if txn.get(reference.id, db=db("references")) is not None:  # it may have been deleted meanwhile
                txn.put(reference.id, record, db=db("records"), overwrite=False)
        if biased:
            txn.put(b"has_bias", b"1", db=db("state"))

    bank.env.write(work, sum(map(len, packed)))


def delete(bank: Bank, ids: Iterable[bytes]) -> int:
    """See Bank.delete."""
    need_writer(bank)
    doomed, db = list(dict.fromkeys(ids)), bank.env.db

    def work(txn: Any) -> int:
        count, log = 0, last_log(txn, db("log"))
        for i in doomed:
            if txn.delete(i, db=db("references")):
                count += 1
                log += 1
                txn.put(struct.pack(">Q", log), bytes([DELETED]) + i, db=db("log"), append=True)
            txn.delete(i, db=db("records"))
            txn.delete(i, db=db("embeddings"))
        return count

    return bank.env.write(work, 4096 * (len(doomed) + 16))


def compact(bank: Bank) -> int:
    """See Bank.compact."""
    need_writer(bank)
    before, db = bank.env.data_path.stat().st_size, bank.env.db

    def forget(txn: Any) -> None:  # an index older than this is built again instead of replayed
        last = last_log(txn, db("log"))
        if last:
            with txn.cursor(db("log")) as cursor:
                found = cursor.first()
                while found and struct.unpack(">Q", cursor.key())[0] < last:
                    found = cursor.delete()
            txn.put(b"log_from", struct.pack(">Q", last), db=db("state"))

    bank.env.write(forget)
    bank.env.swap(lambda env, folder: env.copy(str(folder), compact=True))
    return before - bank.env.data_path.stat().st_size
