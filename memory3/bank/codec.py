"""Vector quantization of key-values with FAISS (Memory3, arXiv 2407.01178, section 3.3 and appendix B).

A spec is a FAISS factory string `OPQ{M}_{d},Residual2x{b},PQ{m}x{n}` (the paper: OPQ20_80,Residual2x14,PQ8x10),
with or without the OPQ part. One codebook for keys and one for values, over all layers and heads of a bank. FAISS
trains and encodes; the tables are kept as plain tensors (`Book`), and memory3_kernels decodes from them.
"""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Memory
from .errors import BankError
from .format import Layout

_SPEC = re.compile(r"^(?:OPQ(\d+)_(\d+),)?Residual2x(\d+),PQ(\d+)x(\d+)$")
COMFORTABLE = 39  # training vectors per centroid below which FAISS calls the training set small
_TABLES = ("coarse", "fine", "rot")


@dataclass(frozen=True)
class Spec:
    """Numbers of a factory string for vectors of `dim`. rotation: M of the OPQ, 0 for none."""

    text: str
    dim: int
    rotation: int
    coarse_bits: int
    fine_parts: int
    fine_bits: int

    @classmethod
    def parse(cls, text: str, dim: int) -> Spec:
        """Raises ValueError when the string or the sizes are not of the supported family."""
        match = _SPEC.match(text)
        if match is None:
            raise ValueError(
                f"codec spec must look like OPQ8_{dim},Residual2x8,PQ8x8 (the OPQ part may be left out), got {text!r}"
            )
        m, d, b, parts, bits = (int(x or 0) for x in match.groups())
        if d not in (0, dim):
            raise ValueError(f"codec spec {text!r} is for vectors of {d}, this model's head_dim is {dim}")
        if dim % 8 or not parts or dim % parts or (d and (m == 0 or dim % m)) or not (4 <= b <= 14 and 4 <= bits <= 14):
            raise ValueError(
                f"codec spec {text!r} does not fit head_dim {dim}: head_dim must be a multiple of 8, of the OPQ parts "
                "and of the PQ parts, and bits must be 4 to 14"
            )
        return cls(text, dim, m, b, parts, bits)

    @property
    def code_bytes(self) -> int:
        """Coarse code (both halves together) and fine code, each padded to bytes, as FAISS lays them out."""
        return -(-2 * self.coarse_bits // 8) - (-self.fine_parts * self.fine_bits // 8)

    @property
    def least_vectors(self) -> int:
        return 1 << max(self.coarse_bits, self.fine_bits, 8 if self.rotation else 0)


@dataclass(frozen=True)
class Tables:
    """One book, fp32: coarse [2, 2^b, D/2], fine [M, 2^n, D/M], rot [D, D] or None; x = rot^T (coarse + fine)."""

    coarse: Tensor
    fine: Tensor
    rot: Tensor | None


class Codec:
    """A trained pair of books. `name` (spec and hash of the tables) is what Identity.codec holds."""

    def __init__(self, spec: str, keys: Tables, values: Tables):
        dim = 2 * keys.coarse.shape[2]
        self.spec = Spec.parse(spec, dim)
        self.keys, self.values = keys, values
        self._faiss: dict[int, Any] = {}
        for plane, tables in (("keys", keys), ("values", values)):
            self._check(plane, tables)
        digest = hashlib.sha256(self.to_bytes()).hexdigest()[:32]
        self.name = f"{spec}:{digest}"

    @property
    def code_bytes(self) -> int:
        return self.spec.code_bytes

    def _check(self, plane: str, tables: Tables) -> None:
        s = self.spec
        want = {
            "coarse": (2, 1 << s.coarse_bits, s.dim // 2),
            "fine": (s.fine_parts, 1 << s.fine_bits, s.dim // s.fine_parts),
            "rot": (s.dim, s.dim) if s.rotation else None,
        }
        for name in _TABLES:
            table = getattr(tables, name)
            got = None if table is None else tuple(table.shape)
            if got != want[name]:
                raise ValueError(f"codec {s.text!r}: {plane} table {name} must be {want[name]}, got {got}")

    def books(self) -> tuple[Any, Any]:
        """(key book, value book) as memory3_kernels.Book, fp32."""
        from memory3_kernels import Book

        return tuple(Book(coarse=t.coarse, fine=t.fine, rot=t.rot) for t in (self.keys, self.values))  # type: ignore[return-value]

    def encode(self, kv: Tensor) -> Tensor:
        """kv [..., Lm, 2, Hm, K, D] -> codes uint8 [..., Lm, 2, Hm, G], by FAISS; padding bytes are zero."""
        *lead, planes, heads, tokens, dim = kv.shape
        if planes != 2 or dim != self.spec.dim:
            raise ValueError(f"kv must be [..., 2, heads, tokens, {self.spec.dim}], got {list(kv.shape)}")
        row = -(-tokens * self.code_bytes // 16) * 16
        out = torch.zeros((*lead, 2, heads, row), dtype=torch.uint8)
        for plane in range(2):
            flat = kv[..., plane, :, :, :].to(torch.float32).reshape(-1, dim).contiguous().numpy()
            codes = torch.from_numpy(self._index(plane).sa_encode(flat)).view(*lead, heads, tokens * self.code_bytes)
            out[..., plane, :, : tokens * self.code_bytes] = codes
        return out

    def decode(self, codes: Tensor, layout: Layout) -> Tensor:
        """codes uint8 [..., 2, Hm, G] -> kv [..., 2, Hm, K, D] in the layout's dtype, by memory3_kernels."""
        from memory3_kernels import vq_dequantize

        size = layout.tokens * self.code_bytes
        planes = []
        for plane, book in enumerate(self.books()):
            part = codes[..., plane, :, :size]
            part = part.reshape(*part.shape[:-1], layout.tokens, self.code_bytes)
            planes.append(vq_dequantize(part.contiguous(), book, layout.dtype))
        return torch.stack(planes, dim=-4)

    def _index(self, plane: int) -> Any:
        """A FAISS index rebuilt from the tables, for encoding."""
        if plane not in self._faiss:
            import faiss

            tables = (self.keys, self.values)[plane]
            index = faiss.index_factory(self.spec.dim, self.spec.text)
            inner, rotation = _parts(index)
            if rotation is not None and tables.rot is not None:
                faiss.copy_array_to_vector(tables.rot.numpy().ravel(), rotation.A)
                rotation.is_trained = rotation.is_orthonormal = True
            coarse = faiss.downcast_index(inner.q1.quantizer)
            faiss.copy_array_to_vector(tables.coarse.numpy().ravel(), coarse.pq.centroids)
            coarse.is_trained = True
            coarse.ntotal = 1 << 2 * self.spec.coarse_bits
            faiss.copy_array_to_vector(tables.fine.numpy().ravel(), inner.pq.centroids)
            inner.is_trained = index.is_trained = True
            self._faiss[plane] = index
        return self._faiss[plane]

    def to_bytes(self) -> bytes:
        """Canonical: spec, then the tables of keys and values as little-endian fp32."""
        spec = self.spec.text.encode()
        parts = [b"M3BK", struct.pack("<II", self.spec.dim, len(spec)), spec]
        for tables in (self.keys, self.values):
            for name in _TABLES:
                table = getattr(tables, name)
                if table is not None:
                    parts.append(table.to(torch.float32).contiguous().numpy().astype("<f4").tobytes())
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Codec:
        """Inverse of to_bytes. Raises BankError when the bytes do not add up."""
        try:
            if raw[:4] != b"M3BK":
                raise ValueError("magic is wrong")
            dim, size = struct.unpack_from("<II", raw, 4)
            spec = Spec.parse(raw[12 : 12 + size].decode("ascii"), dim)
            b, parts, n = spec.coarse_bits, spec.fine_parts, spec.fine_bits
            shapes = [(2, 1 << b, dim // 2), (parts, 1 << n, dim // parts)] + [(dim, dim)] * bool(spec.rotation)
            flat, at, planes = np.frombuffer(raw, "<f4", -1, 12 + size), 0, []
            for _ in range(2):
                tables: list[Tensor | None] = []
                for shape in shapes:
                    count = int(np.prod(shape))
                    tables.append(torch.from_numpy(flat[at : at + count].reshape(shape).copy()))
                    at += count
                planes.append(Tables(*(tables + [None])[:3]))  # type: ignore[arg-type]
            if at != len(flat):
                raise ValueError(f"{len(flat)} numbers stored, {at} expected")
            return cls(spec.text, *planes)
        except (ValueError, struct.error) as error:
            raise BankError(f"the codebooks in the bank are damaged: {error}; salvage needs them whole") from error


def train_codec(spec: str, memories: Sequence[Memory], max_vectors: int = 1_000_000, seed: int = 0) -> Codec:
    """Train both books on the valid rows of `memories` (uniformly drawn references, as the paper does).

    Raises ValueError when there are fewer vectors than centroids; warns below 39 per centroid.
    """
    if not memories:
        raise ValueError("memories must hold at least one memory to train the codec on, got none")
    parsed = Spec.parse(spec, memories[0].kv.shape[-1])
    planes = []
    for plane, name in ((0, "keys"), (1, "values")):
        rows = [m.kv[:, plane, :, : m.n_valid].to(torch.float32).reshape(-1, parsed.dim) for m in memories]
        vectors = torch.cat(rows).numpy()
        if len(vectors) < parsed.least_vectors:
            raise ValueError(
                f"codec {spec!r} needs at least {parsed.least_vectors} training {name}, {COMFORTABLE} times that for "
                f"good books; {len(memories)} memories gave {len(vectors)}. Give more memories or fewer bits"
            )
        if len(vectors) < COMFORTABLE * parsed.least_vectors and plane == 0:
            warnings.warn(
                f"codec {spec!r} is trained on {len(vectors)} vectors per book; "
                f"{COMFORTABLE * parsed.least_vectors} or more give better books",
                stacklevel=2,
            )
        if len(vectors) > max_vectors:
            vectors = vectors[np.random.default_rng(seed).choice(len(vectors), max_vectors, replace=False)]
        planes.append(_train(parsed, np.ascontiguousarray(vectors)))
    return Codec(spec, *planes)


def _parts(index: Any) -> tuple[Any, Any | None]:
    """(Index2Layer, LinearTransform or None) of a factory index."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index), faiss.downcast_VectorTransform(index.chain.at(0))
    return index, None


def _train(spec: Spec, vectors: np.ndarray) -> Tables:
    import faiss

    index = faiss.index_factory(spec.dim, spec.text)
    inner, rotation = _parts(index)
    coarse = faiss.downcast_index(inner.q1.quantizer)
    quiet = [coarse.pq.cp, inner.pq.cp]
    helper = None
    if rotation is not None:
        helper = faiss.ProductQuantizer(spec.dim, spec.rotation, 8)  # what OPQ would make itself, told to be quiet
        rotation.pq = helper
        quiet.append(helper.cp)
    for parameters in quiet:
        parameters.min_points_per_centroid = 1
    index.train(vectors)
    rot = None
    if rotation is not None:
        rotation.pq = None
        rot = torch.from_numpy(faiss.vector_to_array(rotation.A).reshape(spec.dim, spec.dim).copy())
    halves = faiss.vector_to_array(coarse.pq.centroids).reshape(2, 1 << spec.coarse_bits, spec.dim // 2)
    fine = faiss.vector_to_array(inner.pq.centroids).reshape(spec.fine_parts, 1 << spec.fine_bits, -1)
    return Tables(torch.from_numpy(halves.copy()), torch.from_numpy(fine.copy()), rot)
