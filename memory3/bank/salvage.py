"""Copy what is still whole in a damaged bank into a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..identity import Identity
from .codec import Codec
from .env import DATA_FILE
from .errors import BankError, BankNotFound
from .format import Layout, Reference, read_head, unpack_embedding, unpack_reference
from .lmdbfile import salvage_entries
from .store import Bank
from .writing import add_packed

PART = 64


@dataclass(frozen=True)
class SalvageReport:
    """What came over. `damaged`: trees had lost pages, so loose pages were searched too (deleted references may
    be back). `lost_values`: values that were found but failed their checks. `without_text`: records whose
    reference is lost; they can still be read by id. `without_embedding`: search does not find these."""

    references: int
    records: int
    without_text: int
    without_embedding: int
    lost_values: int
    damaged: bool


def salvage(
    source: str | Path, target: str | Path, identity: Identity | None = None,
    embed: Callable[[list[str]], Any] | None = None,
) -> SalvageReport:  # fmt: skip
    """Read a bank's data file without mapping it and copy every value that passes its checks to a new bank.

    source    bank folder (or its data.mdb); it is not changed
    identity  needed only where the header itself is lost
    embed     list of texts -> fp32 [N, E], for references whose embedding is lost
    Values are read twice, so memory use stays small. Raises BankNotFound, BankExists, BankError (no header left).
    """
    source = Path(source)
    data = source if source.is_file() else source / DATA_FILE
    if not data.is_file():
        raise BankNotFound(f"no {DATA_FILE} at {source}; nothing to salvage")
    found = _Finds(data)
    header = identity or found.identity
    if header is None:
        raise BankError(
            f"the header in {data} is lost and with it the ids of the records; call salvage with identity= "
            "(model.identity(embedder=..., codec=...) of the model that wrote the bank)"
        )
    codec = found.codecs.get(header.codec)
    if header.codec != "dense" and codec is None:
        raise BankError(f"the codebooks of {data} ({header.codec}) are lost: its coded records cannot be read")
    with Bank.create(target, header, codec=codec) as bank:
        counts = found.copy(bank, embed)
        bank.build_index()
    return counts


class _Finds:
    """First pass: header, codebooks, references and embeddings (small). Second pass: records, in portions."""

    def __init__(self, data: Path):
        self.data = data
        self.identity: Identity | None = None
        self.codecs: dict[str, Codec] = {}
        self.references: dict[bytes, Reference] = {}
        self.embeddings: dict[bytes, np.ndarray] = {}
        self.lost: set[tuple[str, bytes]] = set()
        entries, self.damaged = salvage_entries(data)
        for _, key, value in entries:
            self._note(key, value)

    def _note(self, key: bytes, value: bytes) -> None:
        if key == b"identity" and self.identity is None:
            try:
                self.identity = Identity.from_json(value)
            except (ValueError, TypeError):
                self.lost.add(("header", key))
        elif key == b"codec" and value[:4] == b"M3BK":
            try:
                codec = Codec.from_bytes(value)
                self.codecs[codec.name] = codec
            except BankError:
                self.lost.add(("codec", key))
        elif len(key) == 16 and value[:4] == b"M3RF":
            self._try("reference", self.references, key, value, unpack_reference)
        elif len(key) == 16 and value[:4] == b"M3EM":
            self._try("embedding", self.embeddings, key, value, unpack_embedding)

    def _try(self, kind: str, into: dict[bytes, Any], key: bytes, value: bytes, unpack: Callable[..., Any]) -> None:
        if key in into:
            return
        try:
            into[key] = unpack(key, value)
            self.lost.discard((kind, key))
        except BankError:
            self.lost.add((kind, key))

    def copy(self, bank: Bank, embed: Callable[[list[str]], Any] | None) -> SalvageReport:
        wrong = [k for k, r in self.references.items() if r.token_ids and bank.record_id(r.token_ids) != k]
        for key in wrong:  # whole, but of another bank or header
            del self.references[key]
        dims = [len(v) for v in self.embeddings.values()]
        dim = max(set(dims), key=dims.count) if dims else 0
        self.embeddings = {k: v for k, v in self.embeddings.items() if len(v) == dim}
        if embed is not None:
            self._embed([r for k, r in self.references.items() if k not in self.embeddings], embed)
        done = self._records(bank)
        rest = [k for k in self.references if k not in done]
        for start in range(0, len(rest), 1024):
            self._add(bank, {k: None for k in rest[start : start + 1024]})
        known = set(self.references) | done
        return SalvageReport(
            references=len(known),
            records=len(done),
            without_text=len(done - set(self.references)),
            without_embedding=len(known - set(self.embeddings)),
            lost_values=len(self.lost) + len(wrong),
            damaged=self.damaged,
        )

    def _embed(self, references: Sequence[Reference], embed: Callable[[list[str]], Any]) -> None:
        for start in range(0, len(references), PART):
            part = references[start : start + PART]
            rows = np.asarray(embed([r.text for r in part]), dtype=np.float32)
            self.embeddings.update(zip((r.id for r in part), rows, strict=True))

    def _records(self, bank: Bank) -> set[bytes]:
        done: set[bytes] = set()
        part: dict[bytes, bytes | None] = {}
        for _, key, value in salvage_entries(self.data)[0]:
            if len(key) != 16 or value[:4] != b"M3RC" or key in done:
                continue
            if not self._whole(key, value, bank.layout):
                self.lost.add(("record", key))
                continue
            self.lost.discard(("record", key))
            done.add(key)
            part[key] = value
            if len(part) == PART:
                self._add(bank, part)
                part = {}
        if part:
            self._add(bank, part)
        return done

    def _whole(self, key: bytes, value: bytes, layout: Layout) -> bool:
        try:
            read_head(key, value, layout)
        except BankError:
            return False
        return True

    def _add(self, bank: Bank, part: dict[bytes, bytes | None]) -> None:
        references = [self.references.get(k) or Reference(k, "") for k in part]
        vectors = {k: self.embeddings[k] for k in part if k in self.embeddings}
        records = {k: v for k, v in part.items() if v is not None}
        biased = any(read_head(k, v, bank.layout, check=False).bias_bytes > 0 for k, v in records.items())
        add_packed(bank, references, vectors, records, biased)
