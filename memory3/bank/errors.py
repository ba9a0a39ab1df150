"""What can go wrong with a bank, one class each; every message says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class BankError(Exception):
    """Base of all bank errors."""


class BankNotFound(BankError):
    """There is no bank at the path."""


class BankExists(BankError):
    """create() found something at the path."""


class BankTruncated(BankError):
    """The data file is shorter than the pages it names, or its first pages are not those of a bank."""


class RecordCorrupt(BankError):
    """A stored value fails its checks; `record_id` (hex) names it."""

    def __init__(self, record_id: bytes, reason: str):
        self.record_id = record_id.hex()
        super().__init__(
            f"record {self.record_id}: {reason}; delete it and add it again, or run salvage to copy what is "
            "whole into a new bank"
        )


class BankLocked(BankError):
    """Another writer has the bank."""


class BankFull(BankError):
    """No room: the disk, a file size limit or max_bytes. What was committed before is intact."""


class BankReadOnly(BankError):
    """A write on a bank that was opened for reading, or that lies where nothing can be written."""


class UnknownRecord(BankError, KeyError):
    """No reference has this id."""

    def __init__(self, record_id: bytes, path: Path):
        self.record_id = record_id.hex()
        super().__init__(f"no reference {self.record_id} in the bank {path}; search() and ids() give the ids")

    def __str__(self) -> str:
        return str(self.args[0])


class ColdRecord(BankError):
    """The reference is registered but its memory is not written yet; `ids` lists all such ids of the call."""

    def __init__(self, ids: Sequence[bytes]):
        self.ids = list(ids)
        shown = ", ".join(i.hex() for i in self.ids[:3]) + (", ..." if len(self.ids) > 3 else "")
        super().__init__(
            f"{len(self.ids)} references are cold, they have text but no memory yet ({shown}); call "
            "Bank.ensure(ids, encode) first (encode writes memories from token ids)"
        )


class IdentityMismatch(BankError):
    """Bank and model (or format) disagree; `fields` holds (name, in the bank, asked for)."""

    def __init__(self, path: Path, fields: Sequence[tuple[str, Any, Any]]):
        self.fields = list(fields)
        lines = "\n".join(f"  {name}: the bank has {mine!r}, asked for {theirs!r}" for name, mine, theirs in fields)
        super().__init__(
            f"the bank {path} was written for something else:\n{lines}\n"
            "Memories are only valid for what wrote them: load the matching model and settings, or write a new bank."
        )
