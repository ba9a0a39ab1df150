"""One file that holds a whole bank: a tar of JSON lines and safetensors, written and read as a stream.

    bank.json           format, identity, number format
    codec.bin           codebooks, in a coded bank
    00000000.jsonl      per reference: id (hex), text, token_ids, title, source, record (whether it has one)
    00000000.safetensors  kv [n, ...] (or codes), pos, n_valid, bias and has_bias of those with a record; embeddings
    ...
    end.json            counts; a file without it was cut off

Nothing in it is executed or unpacked to disk when it is read.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..identity import Identity
from .codec import Codec
from .env import DATA_FILE, sync_folder
from .errors import BankError, IdentityMismatch
from .format import Record, Reference, pack_record, unpack_embedding, unpack_record, unpack_reference
from .header import require_match
from .writing import add_packed

if TYPE_CHECKING:
    from .store import Bank

FORMAT = "memory3-bank-export"
VERSION = 1
PART_BYTES = 64 << 20
PART_REFERENCES = 4096
MEMBER_LIMIT = 1 << 30  # a member that says it is bigger is no part of an export


class ExportDamaged(BankError):
    """An exported file that is cut off or altered."""


def export_bank(bank: Bank, file: Path) -> int:
    """See Bank.export. The file appears whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    counts = {"references": 0, "records": 0}
    try:
        with open(temporary, "wb") as raw:
            with tarfile.open(fileobj=raw, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                about = {"format": FORMAT, "version": VERSION, "identity": json.loads(bank.identity.to_json())}
                _put(tar, "bank.json", json.dumps(about, indent=1).encode())
                if bank.codec is not None:
                    _put(tar, "codec.bin", bank.codec.to_bytes())
                for number, part in enumerate(_parts(bank)):
                    lines, tensors = _part(part)
                    _put(tar, f"{number:08d}.jsonl", lines)
                    _put(tar, f"{number:08d}.safetensors", tensors)
                    counts["references"] += len(part)
                    counts["records"] += sum(record is not None for _, record, _ in part)
                _put(tar, "end.json", json.dumps(counts).encode())
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent.resolve())
    except OSError as error:
        raise BankError(f"cannot export to {file}: {error.strerror or error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)
    return counts["references"]


def _parts(bank: Bank) -> Iterator[list[tuple[Reference, Record | None, np.ndarray | None]]]:
    db, part, size = bank.env.db, [], 0
    for record_id in bank.ids():
        with bank.read() as txn:
            raw = txn.get(record_id, db=db("references"))
            if raw is None:
                continue  # deleted meanwhile
            reference = unpack_reference(record_id, raw)
            value, vector = txn.get(record_id, db=db("records")), txn.get(record_id, db=db("embeddings"))
            record = None if value is None else unpack_record(record_id, value, bank.layout)
            embedding = None if vector is None else unpack_embedding(record_id, vector).copy()
            size += len(raw) + len(value or b"") + len(vector or b"")
        part.append((reference, record, embedding))
        if size >= PART_BYTES or len(part) >= PART_REFERENCES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _part(part: list[tuple[Reference, Record | None, np.ndarray | None]]) -> tuple[bytes, bytes]:
    from safetensors.torch import save

    lines = [
        {"id": r.id.hex(), "text": r.text, "token_ids": r.token_ids, "title": r.title, "source": r.source,
         "record": record is not None, "embedding": vector is not None}
        for r, record, vector in part
    ]  # fmt: skip
    tensors: dict[str, Tensor] = {}
    records = [record for _, record, _ in part if record is not None]
    if records:
        tensors["kv"] = torch.stack([r.kv for r in records])
        tensors["pos"] = torch.stack([r.pos for r in records])
        tensors["n_valid"] = torch.tensor([r.n_valid for r in records], dtype=torch.int32)
        tensors["has_bias"] = torch.tensor([r.bias is not None for r in records], dtype=torch.uint8)
        biases = [r.bias for r in records if r.bias is not None]
        if biases:
            tensors["bias"] = torch.stack(biases)
    vectors = [vector for _, _, vector in part if vector is not None]
    if vectors:
        tensors["embeddings"] = torch.from_numpy(np.stack(vectors))
    return "".join(json.dumps(line) + "\n" for line in lines).encode(), save(tensors)


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def import_bank(file: Path, path: Path, identity: Identity | None) -> Bank:
    """See Bank.import_."""
    bank: Bank | None = None
    try:
        members = _members(file)
        bank = _header(file, members, path, identity)
        counts, ended = {"references": 0, "records": 0}, False
        for name, data in members:
            if name == "end.json":
                ended = json.loads(data) == counts
                break
            if not name.endswith(".jsonl"):
                raise ExportDamaged(f"{file} has an unexpected member {name!r} here")
            other, tensors = next(members, ("", b""))
            if other != name.replace(".jsonl", ".safetensors"):
                raise ExportDamaged(f"{file} is cut off after {name}; what came before is imported")
            for key, count in _take(file, bank, name, data, tensors).items():
                counts[key] += count
        if not ended:
            raise ExportDamaged(f"{file} is cut off or altered: its end is missing or counts otherwise")
        return bank
    except BaseException:
        if bank is not None:
            bank.close()
        raise


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(file, mode="r|") as tar:
            for member in tar:
                if not member.isreg() or member.size > MEMBER_LIMIT:
                    raise ExportDamaged(f"{file}: member {member.name!r} does not belong in an export")
                reader = tar.extractfile(member)
                data = reader.read() if reader is not None else b""
                if len(data) != member.size:
                    raise ExportDamaged(f"{file} is cut off inside {member.name}; what came before is imported")
                yield member.name, data
    except (tarfile.TarError, EOFError) as error:
        raise ExportDamaged(f"{file} is not a whole export: {error}") from error
    except OSError as error:
        raise BankError(f"cannot read {file}: {error.strerror or error}") from error


def _header(file: Path, members: Iterator[tuple[str, bytes]], path: Path, identity: Identity | None) -> Bank:
    from .store import Bank

    name, data = next(members, ("", b""))
    try:
        about = json.loads(data) if name == "bank.json" else {}
    except ValueError:
        about = {}
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ExportDamaged(f"{file} is not an exported bank (it does not start with bank.json)")
    if about.get("version") != VERSION:
        raise IdentityMismatch(file, [("export version", about.get("version"), VERSION)])
    try:
        theirs = Identity.from_json(json.dumps(about["identity"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ExportDamaged(f"{file}: the header does not parse ({error})") from error
    codec = None
    if theirs.codec != "dense":
        name, data = next(members, ("", b""))
        if name != "codec.bin":
            raise ExportDamaged(f"{file}: the codebooks are missing")
        codec = Codec.from_bytes(data)
        if codec.name != theirs.codec:
            raise IdentityMismatch(file, [("codec (hash of the books)", codec.name, theirs.codec)])
    if identity is not None:
        require_match(file, theirs, identity)
    if (path / DATA_FILE).is_file():
        return Bank.open(path, theirs, write=True)
    return Bank.create(path, theirs, codec=codec)


def _take(file: Path, bank: Bank, name: str, lines: bytes, raw: bytes) -> dict[str, int]:
    """Add one part, checking ids against content. Returns what was counted."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        items: list[dict[str, Any]] = [json.loads(line) for line in lines.decode().splitlines()]
        tensors = load(raw)
        with_record = [item for item in items if item["record"]]
        with_vector = [item for item in items if item["embedding"]]
        references = [
            Reference(bytes.fromhex(i["id"]), i["text"], i["token_ids"], i["title"], i["source"]) for i in items
        ]
        records: dict[bytes, bytes] = {}
        biases = iter(tensors["bias"]) if "bias" in tensors else iter(())
        for n, item in enumerate(with_record):
            key = bytes.fromhex(item["id"])
            bias = next(biases) if tensors["has_bias"][n] else None
            kv, pos, n_valid = tensors["kv"][n], tensors["pos"][n], int(tensors["n_valid"][n])
            records[key] = pack_record(key, bank.layout, kv, pos, n_valid, len(item["token_ids"]), bias)
        vectors = {bytes.fromhex(i["id"]): tensors["embeddings"][n].numpy() for n, i in enumerate(with_vector)}
        wrong = [r for r in references if r.token_ids and bank.record_id(r.token_ids) != r.id]
    except (ValueError, KeyError, IndexError, TypeError, StopIteration, SafetensorError) as error:
        raise ExportDamaged(f"{file}: part {name} does not add up ({error})") from error
    if wrong:
        raise ExportDamaged(f"{file}: part {name} has reference {wrong[0].id.hex()} with other tokens than its id says")
    add_packed(bank, references, vectors, records, biased="bias" in tensors)
    return {"references": len(items), "records": len(with_record)}
