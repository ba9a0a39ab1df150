"""FAISS decoding the same codes with the same tables: what the dequantising ops are compared with.

The codes are FAISS' own format (docs/ops/vq_dequantize.md): an index filled with the tables decodes them as they are. A
gather is done for it beforehand: it gets its codes end to end, and an array to write float32 into.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .peer import Peer


def faiss_sa_decode(codes: Tensor, *args: Tensor | None, tokens: int | None = None, dtype: torch.dtype) -> Peer:
    """`sa_decode` of an `OPQ{M}_{D},Residual2x{b},PQ{M}x{n}` index: table entries summed, then the rotation undone.

    Takes the arguments of vq_dequantize or gather_dequantize. FAISS cannot leave its rotation to the reader, so this
    index always has one: the book's, or, for a book without, the identity, which costs as much and gives the same
    values.

    Raises:
        ValueError: a slot is -1 (there are no codes of zeros).
        RuntimeError: FAISS is not installed.
    """
    return _peer(codes, args, tokens, bare=False)


def faiss_bare_sa_decode(codes: Tensor, *args: Tensor | None, tokens: int | None = None, dtype: torch.dtype) -> Peer:
    """`sa_decode` of the `Residual2x{b},PQ{M}x{n}` index alone: for a book without rotation, table entries summed.

    Raises:
        ValueError: the book has a rotation, or a slot is -1.
        RuntimeError: FAISS is not installed.
    """
    if args[-1] is not None:
        raise ValueError("faiss_bare_sa_decode: expected a book without rotation")
    return _peer(codes, args, tokens, bare=True)


def _peer(codes: Tensor, args: tuple[Tensor | None, ...], tokens: int | None, bare: bool) -> Peer:
    *slots, coarse, fine, rot = args
    faiss, index = _index(coarse, fine, rot)
    rows = _rows(codes, slots[0] if slots else None, tokens, index.sa_code_size(), coarse)
    out = np.empty((len(rows), index.d), dtype=np.float32)
    lead = codes.shape[:-1] if tokens is None else (slots[0].shape[0], codes.shape[1], tokens)

    decoder = faiss.downcast_index(index.index) if bare else index

    def call(owner=index) -> np.ndarray:  # the inner index dies with its owner
        faiss.omp_set_num_threads(torch.get_num_threads())
        return decoder.sa_decode(rows, out)

    tables = [t for t in (coarse, fine, rot) if t is not None]
    return Peer(call, lambda found: torch.from_numpy(found).reshape(*lead, index.d), (torch.from_numpy(rows), *tables))


def _rows(codes: Tensor, slots: Tensor | None, tokens: int | None, width: int, coarse: Tensor) -> np.ndarray:
    """Codes end to end, [vectors, width] uint8. Bits that the format ignores are cleared: FAISS takes the coarse code
    as the number of a list, which must exist.
    """
    if slots is not None:
        if bool((slots < 0).any()):
            raise ValueError("faiss_sa_decode: expected slots from 0 on, got -1")
        codes = codes[slots.long()][..., : tokens * width]
    rows = codes.reshape(-1, width).clone()
    bits = 2 * (coarse.shape[1].bit_length() - 1)
    if bits % 8:
        rows[:, bits // 8] &= (1 << bits % 8) - 1
    return rows.numpy()


def _index(coarse: Tensor, fine: Tensor, rot: Tensor | None):
    """(the module faiss, an index with these tables)."""
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError("the peers of the codec need FAISS: pip install faiss-cpu") from error
    b, (parts, entries, width) = coarse.shape[1].bit_length() - 1, fine.shape
    dim = parts * width
    index = faiss.index_factory(
        dim, f"OPQ{parts}_{dim},Residual2x{b},PQ{parts}x{entries.bit_length() - 1}"
    )  # fmt: skip
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    inner = faiss.downcast_index(index.index)
    quantizer = faiss.downcast_index(inner.q1.quantizer)
    matrix = torch.eye(dim) if rot is None else rot
    for table, values in (
        (rotation.A, matrix), (quantizer.pq.centroids, coarse), (inner.pq.centroids, fine),
    ):  # fmt: skip
        faiss.copy_array_to_vector(values.float().contiguous().numpy().ravel(), table)
    rotation.is_trained = rotation.is_orthonormal = True
    quantizer.is_trained, quantizer.ntotal = True, quantizer.pq.ksub**2
    inner.is_trained = index.is_trained = True
    return faiss, index
