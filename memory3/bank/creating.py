"""Making the folder of a new bank."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from ..identity import Identity
from .codec import Codec
from .env import DATABASES, OPEN_LOCK, WRITER_LOCK, open_lmdb
from .errors import BankExists
from .format import Layout


def create_folder(folder: Path, identity: Identity, codec: Codec | None, map_bytes: int) -> None:
    """Header and empty databases; the folder appears whole or not at all. See Bank.create."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BankExists(f"{folder} exists and is not an empty folder; Bank.open opens a bank that is there")
    identity = replace(identity, codec=codec.name if codec else "dense")
    Layout.of(identity)
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
