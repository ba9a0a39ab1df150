"""Bytes of the values in a bank: record (64-byte head and body), reference, embedding.

Everything is little-endian. The head of a record, 64 bytes:

    0  magic "M3RC"      4  version u16       6  flags u16 (1 coded, 2 bias)
    8  n_valid u16      10  n_tokens u16     12  crc32 of the body u32
   16  body bytes u64   24  kv bytes u64     32  record id, 16 bytes
   48  pos bytes u32    52  bias bytes u32   56  zero u32    60  crc32 of bytes 0..59 u32

Body: kv [Lm, 2, Hm, K, D] or codes uint8 [Lm, 2, Hm, G]; then pos u16 [Lm, Hm, K] (0xFFFF none); then, if
flagged, bias fp32 [Lm, Hm, K]. References and embeddings carry a checksum that covers their key too, so that
a value found by salvage is known to belong to its id.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..identity import Identity
from .checksum import crc32
from .errors import RecordCorrupt

RECORD_VERSION = 1
HEAD_BYTES = 64
ID_BYTES = 16
FLAG_CODED, FLAG_BIAS = 1, 2
NO_POSITION = 0xFFFF

_HEAD = struct.Struct("<4sHHHHIQQ16sIIII")
_REFERENCE = struct.Struct("<4sIIII")
_EMBEDDING = struct.Struct("<4sI")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

if sys.byteorder != "little":
    raise ImportError("memory3 banks are little-endian; this machine is big-endian and is not supported")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that Identity.dtype names. Raises ValueError for any other name."""
    try:
        return _DTYPES[name.removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"identity dtype must be one of {', '.join(_DTYPES)}, got {name!r}") from None


@dataclass(frozen=True)
class Layout:
    """Shape of every record of one bank. code_bytes: bytes per coded vector, None for dense."""

    layers: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    code_bytes: int | None = None

    @classmethod
    def of(cls, identity: Identity, code_bytes: int | None = None) -> Layout:
        i = identity
        dtype = torch_dtype(i.dtype)
        return cls(len(i.layers), i.record_heads, i.tokens, i.head_dim, dtype, code_bytes)

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.heads, self.tokens, self.head_dim)

    @property
    def codes_shape(self) -> tuple[int, int, int, int]:
        return (self.layers, 2, self.heads, self.row_bytes)

    @property
    def pos_shape(self) -> tuple[int, int, int]:
        return (self.layers, self.heads, self.tokens)

    @property
    def row_bytes(self) -> int:
        """G: bytes of one head's K codes, padded to 16."""
        return -(-self.tokens * (self.code_bytes or 0) // 16) * 16

    @property
    def kv_bytes(self) -> int:
        if self.code_bytes is not None:
            return self.layers * 2 * self.heads * self.row_bytes
        return self.layers * 2 * self.heads * self.tokens * self.head_dim * self.dtype.itemsize

    @property
    def pos_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.tokens

    @property
    def record_bytes(self) -> int:
        """Head and body without bias."""
        return HEAD_BYTES + self.kv_bytes + self.pos_bytes


class Head(NamedTuple):
    flags: int
    n_valid: int
    n_tokens: int
    crc: int
    body_bytes: int
    kv_bytes: int
    record_id: bytes
    pos_bytes: int
    bias_bytes: int


@dataclass(frozen=True)
class Record:
    """A decoded value, copied out. kv [Lm,2,Hm,K,D], or codes uint8 [Lm,2,Hm,G] in a coded bank."""

    kv: Tensor
    pos: Tensor
    bias: Tensor | None
    n_valid: int
    n_tokens: int


@dataclass(frozen=True)
class Reference:
    """Text side of an id. `title` and `source` may be empty."""

    id: bytes
    text: str
    token_ids: list[int] = field(default_factory=list)
    title: str = ""
    source: str = ""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor (bf16 too); shares memory when it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def pack_record(
    record_id: bytes, layout: Layout, kv: Tensor, pos: Tensor, n_valid: int, n_tokens: int, bias: Tensor | None
) -> bytes:
    """One LMDB value. kv: dense [Lm,2,Hm,K,D], or codes uint8 [Lm,2,Hm,G] when the layout is coded.

    Raises ValueError naming an argument that does not fit the layout. Dense rows >= n_valid are written as zero.
    """
    coded = layout.code_bytes is not None
    shape, dtype = (layout.codes_shape, torch.uint8) if coded else (layout.kv_shape, layout.dtype)
    if tuple(kv.shape) != shape or kv.dtype != dtype:
        raise ValueError(f"kv must be {dtype} {list(shape)} for this bank, got {kv.dtype} {list(kv.shape)}")
    if tuple(pos.shape) != layout.pos_shape:
        raise ValueError(f"pos must be {list(layout.pos_shape)}, got {list(pos.shape)}")
    if not 0 <= n_valid <= layout.tokens:
        raise ValueError(f"n_valid must be in 0..{layout.tokens}, got {n_valid}")
    if not 0 <= n_tokens < 0x10000:
        raise ValueError(f"n_tokens must fit 16 bits (0..65535), got {n_tokens}")
    if pos.numel() and (int(pos.min()) < -1 or int(pos.max()) >= NO_POSITION):
        raise ValueError(f"pos must be -1 or 0..65534, got {int(pos.min())}..{int(pos.max())}")
    kv = kv.cpu()
    if not coded and n_valid < layout.tokens and bool(kv[..., n_valid:, :].any()):
        kv = kv.clone()
        kv[..., n_valid:, :] = 0
    places = pos.to(torch.int32).cpu().numpy().copy()
    places[places < 0] = NO_POSITION
    parts = [tensor_bytes(kv), memoryview(places.astype("<u2")).cast("B")]
    flags, bias_bytes = (FLAG_CODED if coded else 0), 0
    if bias is not None:
        if tuple(bias.shape) != layout.pos_shape:
            raise ValueError(f"bias must be {list(layout.pos_shape)}, got {list(bias.shape)}")
        parts.append(tensor_bytes(bias.to(torch.float32).cpu()))
        flags |= FLAG_BIAS
        bias_bytes = 2 * layout.pos_bytes
    crc = 0
    for part in parts:
        crc = crc32(part, crc)
    body = layout.kv_bytes + layout.pos_bytes + bias_bytes
    fields = (b"M3RC", RECORD_VERSION, flags, n_valid, n_tokens, crc, body, layout.kv_bytes)
    head = bytearray(_HEAD.pack(*fields, record_id, layout.pos_bytes, bias_bytes, 0, 0))
    struct.pack_into("<I", head, 60, crc32(head[:60]))
    return b"".join([head, *parts])


def read_head(record_id: bytes, value: memoryview | bytes, layout: Layout, *, check: bool = True) -> Head:
    """Head of a record, fully checked; with `check` the body's checksum too. Raises RecordCorrupt."""
    view = memoryview(value)
    if len(view) < HEAD_BYTES:
        raise RecordCorrupt(record_id, f"{len(view)} bytes stored, its head alone has {HEAD_BYTES}")
    magic, version, flags, n_valid, n_tokens, crc, body, kv, stored_id, pos, bias, _, head_crc = _HEAD.unpack_from(view)
    if magic != b"M3RC" or crc32(view[:60]) != head_crc:
        raise RecordCorrupt(record_id, "its head is damaged (magic or checksum)")
    if version != RECORD_VERSION:
        raise RecordCorrupt(record_id, f"it has record version {version}, this program reads {RECORD_VERSION}")
    if stored_id != record_id:
        raise RecordCorrupt(record_id, f"the value stored here belongs to {stored_id.hex()}")
    want_bias = 2 * layout.pos_bytes if flags & FLAG_BIAS else 0
    want = (layout.kv_bytes, layout.pos_bytes, want_bias, layout.kv_bytes + layout.pos_bytes + want_bias)
    if (kv, pos, bias, body) != want or bool(flags & FLAG_CODED) != (layout.code_bytes is not None):
        raise RecordCorrupt(record_id, f"its sizes (kv, pos, bias, body) are {(kv, pos, bias, body)}, not {want}")
    if n_valid > layout.tokens or flags & ~(FLAG_CODED | FLAG_BIAS):
        raise RecordCorrupt(record_id, f"its head says n_valid {n_valid}, flags {flags:#x}")
    if len(view) != HEAD_BYTES + body:
        raise RecordCorrupt(record_id, f"{len(view)} bytes stored, its head says {HEAD_BYTES + body}")
    if check and crc32(view[HEAD_BYTES:]) != crc:
        raise RecordCorrupt(record_id, "the checksum of its body is wrong")
    return Head(flags, n_valid, n_tokens, crc, body, kv, stored_id, pos, bias)


def read_bias(value: memoryview | bytes, head: Head, layout: Layout) -> Tensor | None:
    """The bias fp32 [Lm,Hm,K], copied, or None where the record has none."""
    if not head.flags & FLAG_BIAS:
        return None
    start = HEAD_BYTES + head.kv_bytes + head.pos_bytes
    flat = np.frombuffer(value, "<f4", head.bias_bytes // 4, start)
    return torch.from_numpy(flat.copy()).view(layout.pos_shape)


def unpack_record(record_id: bytes, value: memoryview | bytes, layout: Layout) -> Record:
    """Inverse of pack_record; every tensor is a copy. Raises RecordCorrupt."""
    head = read_head(record_id, value, layout)
    raw = torch.from_numpy(np.frombuffer(value, np.uint8, head.kv_bytes, HEAD_BYTES).copy())
    kv = raw.view(layout.codes_shape) if layout.code_bytes is not None else raw.view(layout.dtype).view(layout.kv_shape)
    places = np.frombuffer(value, "<u2", head.pos_bytes // 2, HEAD_BYTES + head.kv_bytes).astype(np.int32)
    places[places == NO_POSITION] = -1
    pos = torch.from_numpy(places).view(layout.pos_shape)
    return Record(kv, pos, read_bias(value, head, layout), head.n_valid, head.n_tokens)


def pack_reference(reference: Reference) -> bytes:
    """Token ids u32, text UTF-8 and a small JSON object of title and source."""
    text = reference.text.encode("utf-8", "surrogatepass")
    tokens = np.asarray(reference.token_ids, dtype="<u4").tobytes()
    about = {k: v for k, v in (("title", reference.title), ("source", reference.source)) if v}
    extra = json.dumps(about).encode() if about else b""
    payload = struct.pack("<III", len(reference.token_ids), len(text), len(extra)) + tokens + text + extra
    return b"M3RF" + struct.pack("<I", crc32(payload, crc32(reference.id))) + payload


def unpack_reference(record_id: bytes, value: memoryview | bytes) -> Reference:
    """Inverse of pack_reference. Raises RecordCorrupt."""
    view = memoryview(value)
    if len(view) < _REFERENCE.size:
        raise RecordCorrupt(record_id, f"its reference has {len(view)} bytes, at least {_REFERENCE.size} needed")
    magic, crc, n_tokens, n_text, n_extra = _REFERENCE.unpack_from(view)
    if magic != b"M3RF" or crc32(view[8:], crc32(record_id)) != crc:
        raise RecordCorrupt(record_id, "the checksum of its reference is wrong")
    start = _REFERENCE.size
    if len(view) != start + 4 * n_tokens + n_text + n_extra:
        raise RecordCorrupt(record_id, "the sizes in its reference do not add up")
    tokens = np.frombuffer(view, "<u4", n_tokens, start).tolist()
    start += 4 * n_tokens
    try:
        text = bytes(view[start : start + n_text]).decode("utf-8", "surrogatepass")
        about = json.loads(bytes(view[start + n_text :])) if n_extra else {}
        return Reference(record_id, text, tokens, str(about.get("title", "")), str(about.get("source", "")))
    except (ValueError, AttributeError) as error:
        raise RecordCorrupt(record_id, f"its reference does not decode ({error})") from None


def pack_embedding(record_id: bytes, vector: np.ndarray) -> bytes:
    """vector fp32 [E]."""
    data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return _EMBEDDING.pack(b"M3EM", crc32(data, crc32(record_id))) + data


def unpack_embedding(record_id: bytes, value: memoryview | bytes, dim: int | None = None) -> np.ndarray:
    """fp32 [E], a view of `value`. Raises RecordCorrupt; `dim`, where given, must be E."""
    view = memoryview(value)
    if len(view) < _EMBEDDING.size or (len(view) - _EMBEDDING.size) % 4:
        raise RecordCorrupt(record_id, f"its embedding has {len(view)} bytes")
    magic, crc = _EMBEDDING.unpack_from(view)
    if magic != b"M3EM" or crc32(view[_EMBEDDING.size :], crc32(record_id)) != crc:
        raise RecordCorrupt(record_id, "the checksum of its embedding is wrong")
    vector = np.frombuffer(view, "<f4", -1, _EMBEDDING.size)
    if dim is not None and len(vector) != dim:
        raise RecordCorrupt(record_id, f"its embedding has {len(vector)} numbers, the bank has {dim}")
    return vector


def check_embeddings(embeddings: np.ndarray | Tensor | Sequence[Sequence[float]], count: int) -> np.ndarray:
    """fp32 [count, E], each row scaled to length 1 (a zero row stays). Raises ValueError."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().to(torch.float32).cpu().numpy()
    rows = np.array(embeddings, dtype=np.float32, ndmin=2)
    if rows.ndim != 2 or len(rows) != count or (count and rows.shape[1] == 0):
        raise ValueError(f"embeddings must be [{count}, E], one row per reference, got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"embeddings must be finite, row {bad} is not; check the embedder")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
