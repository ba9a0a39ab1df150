"""The codebooks of one side (keys or values) of the coded memory format."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Book(NamedTuple):
    """A two-stage code of vectors of length D: x = rot^T (coarse part + fine part).

    Attributes:
        coarse: [2, 2^b, D/2] float32 or float16: centroids of the two halves, b bits each.
        fine: [M, 2^n, D/M], same dtype: centroids of the residual's M pieces, n bits each.
        rot: [D, D] float32, orthonormal, applied to vectors before coding; None where there is no rotation.

    The code of a vector is a string of bits, the two coarse indices and then the M fine ones, each lowest bit first,
    padded to whole bytes (the order of FAISS' BitstringWriter).
    """

    coarse: Tensor
    fine: Tensor
    rot: Tensor | None = None
