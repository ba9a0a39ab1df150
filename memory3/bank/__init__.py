"""Banks of explicit memories: one folder with an LMDB file (records, embeddings, text) and a FAISS index cache."""

from .errors import (
    BankError,
    BankExists,
    BankFull,
    BankLocked,
    BankNotFound,
    BankReadOnly,
    BankTruncated,
    ColdRecord,
    IdentityMismatch,
    RecordCorrupt,
    UnknownRecord,
)
from .format import Layout, Reference
from .store import Bank, RecordInfo

from .salvage import SalvageReport, salvage  # isort: skip - needs Bank

__all__ = [
    "Bank",
    "BankError",
    "BankExists",
    "BankFull",
    "BankLocked",
    "BankNotFound",
    "BankReadOnly",
    "BankTruncated",
    "ColdRecord",
    "IdentityMismatch",
    "Layout",
    "RecordCorrupt",
    "RecordInfo",
    "Reference",
    "SalvageReport",
    "UnknownRecord",
    "salvage",
]
