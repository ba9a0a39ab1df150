"""What the changed interpreter must do, so that a Triton that breaks the change is seen at once: numbers as hardware
has them, and an error for every access a kernel may not make.

Run by test_triton_interpreter.py, like interpreted.py:
    TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreter_rules.py
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from memory3_kernels.testing.triton_interpreter import install

install()


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a * b)
    tl.store(out + 2 * N + i, tl.maximum(a, b))
    tl.store(out + 3 * N + i, tl.where(a < b, -a, b))
    tl.store(out + 4 * N, tl.max(a, 0))


@triton.jit
def dot_kernel(x, y, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION)
    tl.store(out + at, product)


@triton.jit
def copy_kernel(x, out, n, SHIFT: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * SHIFT + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def one_address_kernel(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N) // 2, tl.arange(0, N))


@triton.jit
def atomic_kernel(out):
    tl.atomic_add(out, 1.0)


def test_bfloat16_is_rounded_to_nearest_even():
    """1.999 is 2.0 as bfloat16; cut off, as the stock interpreter does, it would be 1.9921875."""
    x = torch.randn(1024) * 100
    x[:4] = torch.tensor([1.999, 1.00390625, 1.01171875, -torch.inf])  # the second and third are ties
    out = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, 1024)
    assert out[0] == 2.0
    assert torch.equal(out, x.bfloat16())


def test_bfloat16_arithmetic():
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, 64)
    wanted = torch.cat([x + y, x * y, torch.maximum(x, y), torch.where(x < y, -x, y), x.max()[None]])
    assert torch.equal(out, wanted)


def test_dot_of_bfloat16():
    x, y = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, 32, "tf32")
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def test_dot_in_tf32_loses_13_bits():
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    exact, rounded = torch.empty(32, 32), torch.empty(32, 32)
    dot_kernel[(1,)](x, y, exact, 32, "ieee")
    dot_kernel[(1,)](x, y, rounded, 32, "tf32")
    wanted = x.double() @ y.double()
    assert (exact - wanted).norm() < 1e-6 * wanted.norm()
    assert 1e-4 * wanted.norm() < (rounded - wanted).norm() < 1e-3 * wanted.norm()


def test_the_checks_let_good_kernels_pass():
    x, out = torch.randn(100), torch.zeros(100)
    copy_kernel[(4,)](x, out, 100, 32, 32)
    assert torch.equal(x, out)


def test_an_access_behind_the_end_is_an_error():
    with pytest.raises(InterpreterError, match="AccessError.*load out of bounds: 28 of 128 lanes"):
        copy_kernel[(1,)](torch.randn(100), torch.zeros(128), 128, 128, 128)


def test_an_access_behind_a_view_is_an_error():
    """The memory is there, but the kernel was not given it."""
    whole = torch.randn(128)
    with pytest.raises(InterpreterError, match="AccessError.*load out of bounds: 64 of 128 lanes"):
        copy_kernel[(1,)](whole[:64], torch.zeros(128), 128, 128, 128)


def test_a_store_of_two_programs_to_one_address_is_an_error():
    with pytest.raises(
        InterpreterError, match=r"store at an address that program \(0, 0, 0\) wrote, program \(1, 0, 0\)"
    ):
        copy_kernel[(2,)](torch.randn(100), torch.zeros(100), 100, 16, 32)


def test_a_load_of_what_another_program_wrote_is_an_error():
    both = torch.randn(48)
    with pytest.raises(InterpreterError, match=r"AccessError.*load at an address that program \(0, 0, 0\) wrote"):
        copy_kernel[(2,)](both, both, 48, 16, 32)


def test_a_store_of_two_lanes_to_one_address_is_an_error():
    with pytest.raises(InterpreterError, match="AccessError.*store of two lanes to one address"):
        one_address_kernel[(1,)](torch.zeros(8, dtype=torch.int32), 16)


def test_an_atomic_is_an_error():
    with pytest.raises(InterpreterError, match="AccessError.*an atomic"):
        atomic_kernel[(1,)](torch.zeros(1))
