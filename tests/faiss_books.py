"""FAISS indexes of the coded format, and their tables as a Book: the tests' own way, independent of memory3.bank."""

from __future__ import annotations

import faiss
import numpy as np
import torch

from memory3_kernels import Book


def random_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Correlated values, so that the rotation and the coarse part have something to learn."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((dim, dim)) * rng.uniform(0.1, 1.0, dim)
    return (rng.standard_normal((count, dim)) @ mix).astype(np.float32)


def trained(spec: str, dim: int, count: int = 1100) -> faiss.IndexPreTransform:
    """An index of `spec` trained on few vectors with few iterations: its codes are poor, its format is the real one."""
    index = faiss.index_factory(dim, spec)
    rotation, inner = parts(index)
    if rotation is not None:
        rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 2, 2, 2
    inner.pq.cp.niter = coarse_of(inner).pq.cp.niter = 2
    index.train(random_vectors(count, dim))
    return index


def parts(index):
    """(OPQ transform or None, Index2Layer)."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)
    return None, index


def coarse_of(inner):
    return faiss.downcast_index(inner.q1.quantizer)


def book_of(index) -> Book:
    """The tables of an index, fp32."""
    rotation, inner = parts(index)
    coarse, dim = coarse_of(inner).pq, inner.d
    halves = faiss.vector_to_array(coarse.centroids).reshape(2, coarse.ksub, dim // 2)
    fine = faiss.vector_to_array(inner.pq.centroids).reshape(inner.pq.M, inner.pq.ksub, inner.pq.dsub)
    rot = None if rotation is None else torch.from_numpy(faiss.vector_to_array(rotation.A).reshape(dim, dim))
    return Book(torch.from_numpy(halves), torch.from_numpy(fine), rot)


def untrained(spec: str, dim: int, seed: int = 0):
    """An index of `spec` with random tables in place of trained ones: full codebook sizes without the training."""
    rng = np.random.default_rng(seed)
    index = faiss.index_factory(dim, spec)
    rotation, inner = parts(index)
    if rotation is not None:
        matrix = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        faiss.copy_array_to_vector(matrix.ravel(), rotation.A)
        rotation.is_trained = rotation.is_orthonormal = True
    coarse = coarse_of(inner)
    size = 2 * coarse.pq.ksub * (dim // 2)
    faiss.copy_array_to_vector(rng.standard_normal(size).astype(np.float32), coarse.pq.centroids)
    coarse.is_trained, coarse.ntotal = True, coarse.pq.ksub**2
    size = inner.pq.ksub * dim
    faiss.copy_array_to_vector((0.3 * rng.standard_normal(size)).astype(np.float32), inner.pq.centroids)
    inner.is_trained = index.is_trained = True
    return index
