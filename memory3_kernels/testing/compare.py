"""The one comparison: NaN and infinity patterns first, then the relative norm of the difference."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "output") -> None:
    """Compares a result with a (wider) reference.

    Args:
        actual: a backend's output.
        expected: the reference's, same shape; any floating dtype, or integer (then equality is required).
        tolerance: bound on ||actual - expected|| / ||expected||, and on the largest single error relative to the
            largest value, times 4.

    Raises:
        AssertionError: naming the worst index and both values.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            where = (actual != expected).nonzero()[0].tolist()
            raise AssertionError(
                f"{name}{where}: got {actual[tuple(where)].item()}, expected {expected[tuple(where)].item()}"
            )
        return
    a, e = actual.double(), expected.double()
    for label, pattern in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = pattern(a) != pattern(e)
        if differs.any():
            where = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(f"{name}{list(where)}: {label} pattern differs: got {a[where]}, expected {e[where]}")
    finite = torch.isfinite(e)
    difference = torch.where(finite, a - e, 0).abs()
    scale = torch.where(finite, e, 0)
    if difference.numel() == 0:
        return
    relative = (difference.norm() / scale.norm().clamp_min(1e-30)).item()
    worst = (difference.max() / scale.abs().max().clamp_min(1e-30)).item()
    if relative > tolerance or worst > 4 * tolerance:
        index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: relative error {relative:.3g} (worst {worst:.3g} of the largest value), allowed {tolerance:.3g}; "
            f"worst at {list(index)}: got {a[index].item():.7g}, expected {e[index].item():.7g}"
        )


def widen(value, dtype: torch.dtype = torch.float64):
    """Floating tensors (also inside tuples and dicts) as `dtype`; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(widen(v, dtype) for v in value)
    if isinstance(value, list):
        return [widen(v, dtype) for v in value]
    if isinstance(value, dict):
        return {k: widen(v, dtype) for k, v in value.items()}
    return value


def as_tuple(outputs) -> tuple:
    """Op outputs as a tuple: a single tensor becomes one element, None an empty tuple."""
    if outputs is None:
        return ()
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
