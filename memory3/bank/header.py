"""The header of a bank: made once with its folder, read and compared at every open."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import lmdb

from ..identity import FORMAT_VERSION, Identity
from .codec import Codec
from .env import DATABASES, full_reason, open_lmdb
from .errors import BankError, BankExists, BankFull, BankNotFound, IdentityMismatch
from .format import Layout
from .locks import OPEN_LOCK, WRITER_LOCK


def create_folder(folder: Path, identity: Identity, codec: Codec | None, map_bytes: int) -> None:
    """Header and empty databases; the folder appears whole or not at all. See Bank.create."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BankExists(f"{folder} exists and is not an empty folder; Bank.open opens a bank that is there")
    identity = replace(identity, codec=codec.name if codec else "dense")
    Layout.of(identity)
    try:
        _create(folder, identity, codec, map_bytes)
    except (OSError, lmdb.Error) as error:
        reason = full_reason(error, folder.parent, 1 << 16)
        if reason is not None:
            raise BankFull(f"cannot make a bank at {folder}: {reason}; nothing was left behind") from error
        raise BankError(f"cannot make a bank at {folder}: {error}; nothing was left behind") from error


def _create(folder: Path, identity: Identity, codec: Codec | None, map_bytes: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    fresh = folder.parent / f".{folder.name}.new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        env = open_lmdb(fresh, map_bytes)
        try:
            with env.begin(write=True) as txn:
                dbs = {name: env.open_db(name.encode(), txn) for name in DATABASES}
                txn.put(b"identity", identity.to_json().encode(), db=dbs["header"])
                if codec:
                    txn.put(b"codec", codec.to_bytes(), db=dbs["header"])
                txn.put(b"epoch", uuid.uuid4().bytes, db=dbs["state"])
        finally:
            env.close()
        for name in (OPEN_LOCK, WRITER_LOCK):
            (fresh / name).touch()
        os.rename(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _clear_abandoned(folder: Path) -> None:
    """Remove half-made folders of creators that died."""
    for old in folder.parent.glob(f".{folder.name}.new-*"):
        try:
            os.kill(int(old.name.rsplit("-", 1)[1]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(old, ignore_errors=True)
        except PermissionError:
            continue


def read_identity(path: Path, raw: bytes | None) -> Identity:
    """Identity from the stored header. Raises BankNotFound (none), IdentityMismatch (another format), BankError."""
    if raw is None:
        raise BankNotFound(f"{path} holds no bank header; it is not a memory3 bank")
    try:
        identity = Identity.from_json(raw)
    except (ValueError, TypeError) as error:
        version = _format_version(raw)
        if version is not None and version != FORMAT_VERSION:
            raise IdentityMismatch(path, [("format_version", version, FORMAT_VERSION)]) from None
        raise BankError(f"the header of the bank {path} does not parse: {error}; salvage it") from error
    if identity.format_version != FORMAT_VERSION:
        raise IdentityMismatch(path, [("format_version", identity.format_version, FORMAT_VERSION)])
    return identity


def require_match(path: Path, stored: Identity, asked: Identity) -> None:
    """Raise IdentityMismatch naming each field that differs. See Bank.check for what asks for nothing."""
    skip = {name for name, free in (("embedder", ""), ("codec", "dense")) if getattr(asked, name) == free}
    fields = [entry for entry in stored.mismatches(asked) if entry[0] not in skip]
    if fields:
        raise IdentityMismatch(path, fields)


def _format_version(raw: bytes) -> int | None:
    try:
        return int(json.loads(raw)["format_version"])
    except (ValueError, KeyError, TypeError):
        return None
