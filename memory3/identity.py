"""Who wrote a memory: the header that a bank stores once, and the ids of its records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import MemoryConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """Everything that must agree before a record may be read.

    model_hash is of the base checkpoint (and adapter), whatever precision runs it; codec is "dense" or
    a codec name with the hash of its books; embedder names the retriever's text encoder.
    """

    model_hash: str
    tokenizer_hash: str
    prefix_ids: tuple[int, ...]
    context_bos_ids: tuple[int, ...]
    layers: tuple[int, ...]
    head_map: tuple[tuple[int, ...], ...] | None
    tokens: int
    span: int
    head_dim: int
    record_heads: int
    rope_base: float
    rope_scaling: dict[str, Any] | None
    dtype: str
    rule: str
    codec: str = "dense"
    embedder: str = ""
    format_version: int = FORMAT_VERSION

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Its UTF-8 bytes are what ids are made from."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Identity:
        """Inverse of to_json. Raises ValueError naming a missing or unknown field."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError(f"identity must be a JSON object, got {type(raw).__name__}")
        names = {f.name for f in fields(cls)}
        missing, unknown = sorted(names - raw.keys()), sorted(raw.keys() - names)
        if missing or unknown:
            raise ValueError(f"identity has missing fields {missing} and unknown fields {unknown}")
        for name in ("prefix_ids", "context_bos_ids", "layers"):
            raw[name] = tuple(raw[name])
        if raw["head_map"] is not None:
            raw["head_map"] = tuple(tuple(row) for row in raw["head_map"])
        return cls(**raw)

    def mismatches(self, other: Identity) -> list[tuple[str, Any, Any]]:
        """(field, mine, theirs) for each field that differs, in field order."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]

    def memory_config(self) -> MemoryConfig:
        """The memory configuration that reads these records (chunk, refs and min_query at their defaults)."""
        names = ("layers", "head_map", "tokens", "span", "rule", "prefix_ids", "context_bos_ids")
        return MemoryConfig(**{name: getattr(self, name) for name in names})

    @cached_property
    def _header_state(self) -> Any:
        return hashlib.sha256(self.to_json().encode())

    def record_id(self, token_ids: Sequence[int]) -> bytes:
        """16 bytes: SHA-256 of the header's JSON and then the reference's token ids as little-endian u32."""
        state = self._header_state.copy()
        state.update(_u32_bytes(token_ids))
        return state.digest()[:16]


def _u32_bytes(token_ids: Sequence[int]) -> bytes:
    return b"".join(int(t).to_bytes(4, "little") for t in token_ids)


_FILE_HASHES: dict[tuple[str, int, int], str] = {}


def hash_file(path: str | Path) -> str:
    """SHA-256 hex of a file; remembered in this process by path, size and modification time."""
    path = Path(path).resolve()
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _FILE_HASHES:
        state = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
        _FILE_HASHES[key] = state.hexdigest()
    return _FILE_HASHES[key]


def hash_files(paths: Iterable[str | Path]) -> str:
    """SHA-256 hex over (name, hash) of several files, independent of their order and folder."""
    state = hashlib.sha256()
    for path in sorted(map(Path, paths), key=lambda p: p.name):
        state.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return state.hexdigest()


def combine_hashes(base: str, adapter: str) -> str:
    """Hash of a base checkpoint with an adapter on it."""
    return hashlib.sha256(f"{base}+{adapter}".encode()).hexdigest()
