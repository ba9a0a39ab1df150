"""The C ABI as another language sees it: structs and launchers of libm3_cpu.so through ctypes, no torch binding."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from ctypes import Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p, cast
from pathlib import Path

import numpy as np
import pytest

from memory3_kernels import _cuda, _load

pytestmark = pytest.mark.skipif(
    os.environ.get("M3_NATIVE") == "0", reason="M3_NATIVE=0: this run covers the references"
)
INCLUDE = Path(__file__).parent.parent / "csrc" / "include"
OK, INVALID, UNSUPPORTED = 0, 1, 2
F32 = 0


class MergeParams(Structure):
    _fields_ = [(n, c_int64) for n in ("tokens", "heads", "dim")] + [("dtype", c_int)]
    _fields_ += [(n, c_void_p) for n in ("out_a", "out_b", "lse_a", "lse_b", "out", "lse")]


class SelectParams(Structure):
    _fields_ = [(n, c_int64) for n in ("refs", "rows", "q_heads", "kv_heads", "dim", "tokens", "start", "workers")] + [
        ("scale", c_float),
        ("rule", c_int),
        ("dtype", c_int),
    ]
    _fields_ += [(n, c_void_p) for n in ("q", "k", "length", "index", "workspace")]
    _fields_ += [("q_stride", c_int64 * 3), ("k_stride", c_int64 * 3)]


class Book(Structure):
    _fields_ = [(n, c_int64) for n in ("dim", "coarse_bits", "fine_parts", "fine_bits")] + [("dtype", c_int)]
    _fields_ += [(n, c_void_p) for n in ("coarse", "fine", "rot")]


class VqParams(Structure):
    _fields_ = [("vectors", c_int64), ("book", Book), ("dtype", c_int), ("codes", c_void_p), ("out", c_void_p)]
    _fields_ += [("code_stride", c_int64)]


STRUCTS = {
    "merge_attention_states": ("M3MergeAttentionStatesParams", MergeParams),
    "select_tokens": ("M3SelectTokensParams", SelectParams),
    "vq_dequantize": ("M3VqDequantizeParams", VqParams),
}


@pytest.fixture(scope="module")
def core():
    core = ctypes.CDLL(str(_load.CPU_LIBRARY))
    for name in ("m3_version", "m3_simd", "m3_last_error"):
        getattr(core, name).restype = c_char_p
    core.m3_select_tokens_workspace.restype = c_int64
    return core


@pytest.fixture
def level(core):
    before = core.m3_simd()
    yield
    core.m3_set_simd(before)


def pointer(array: np.ndarray) -> c_void_p:
    return cast(array.ctypes.data, c_void_p)


def test_structs_match_the_headers(tmp_path):
    """Sizes and offsets here equal the C compiler's, so what follows tests the ABI and not a guess of it."""
    lines = ["#include <stdio.h>", "#include <stddef.h>"] + [f'#include "m3/{name}.h"' for name in STRUCTS]
    wanted, prints = [], []
    for c_name, mirror in STRUCTS.values():
        prints.append(f'printf("%zu\\n", sizeof({c_name}));')
        wanted.append(ctypes.sizeof(mirror))
        for field, *_ in mirror._fields_:
            prints.append(f'printf("%zu\\n", offsetof({c_name}, {field}));')
            wanted.append(getattr(mirror, field).offset)
    source = tmp_path / "sizes.c"
    source.write_text("\n".join([*lines, "int main(void) {", *prints, "return 0; }"]))
    subprocess.run(["gcc", "-std=c11", f"-I{INCLUDE}", source, "-o", tmp_path / "sizes"], check=True)
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout.split()
    assert [int(n) for n in printed] == wanted


def test_version(core):
    assert core.m3_version().decode() == (INCLUDE.parent.parent / "VERSION").read_text().strip()


def test_every_level_the_cpu_has_can_be_set(core, level):
    for name in _load.available_simd_levels():
        assert core.m3_set_simd(name.encode()) == OK
        assert core.m3_simd().decode() == name


def test_unknown_level(core, level):
    before = core.m3_simd()
    assert core.m3_set_simd(b"mmx") == INVALID
    assert core.m3_last_error() == b"SIMD level: expected none, avx2, avx512, avx512bf16 or amx, got mmx"
    assert core.m3_simd() == before


def test_merge(core):
    out_a, out_b = np.full((1, 1, 8), 1.0, np.float32), np.full((1, 1, 8), 3.0, np.float32)
    lse = [np.zeros((1, 1), np.float32) for _ in range(3)]
    out = np.full((1, 1, 8), np.nan, np.float32)
    p = MergeParams(1, 1, 8, F32, *map(pointer, (out_a, out_b, lse[0], lse[1], out, lse[2])))
    assert core.m3_merge_attention_states_cpu(byref(p)) == OK
    assert np.allclose(out, 2.0) and np.allclose(lse[2], np.log(2.0))
    p.heads = -1
    assert core.m3_merge_attention_states_cpu(byref(p)) == INVALID
    assert b"negative size" in core.m3_last_error()


def select(core, length: int, rule: int = 0, workers: int = 1, tokens: int = 2):
    """Three rows; row 2 draws the attention. Returns (status, index)."""
    q = np.ones((1, 3, 1, 8), np.float32)
    k = np.zeros((1, 3, 1, 8), np.float32)
    k[0, 2], k[0, 0] = 1.0, 0.5
    lengths, index = np.array([length], np.int32), np.full((1, 1, 64), 99, np.int32)
    strides = (c_int64 * 3)(24, 8, 8)
    p = SelectParams(1, 3, 1, 1, 8, tokens, 0, workers, 1.0, rule, F32)
    p.q_stride = p.k_stride = strides
    workspace = np.full(max(workers, 1) * core.m3_select_tokens_workspace(byref(p)) + 1, np.nan, np.float32)
    workspace[-1] = 7.0
    p.q, p.k, p.length, p.index, p.workspace = map(pointer, (q, k, lengths, index, workspace))
    status = core.m3_select_tokens_cpu(byref(p))
    assert workspace[-1] == 7.0, "wrote past its workspace"
    return status, index[0, 0, : tokens + 1].tolist()


def test_select_in_every_level(core, level):
    for name in _load.available_simd_levels():
        core.m3_set_simd(name.encode())
        for rule in (0, 1):
            assert select(core, 3, rule) == (OK, [0, 2, 99])
        assert select(core, 1) == (OK, [0, -1, 99])
        assert select(core, 3, workers=4) == (OK, [0, 2, 99])


def test_select_refuses(core):
    assert select(core, 4)[0] == INVALID
    assert core.m3_last_error() == b"length[0]: expected 0..3, got 4"
    assert select(core, 3, rule=7)[0] == INVALID
    assert core.m3_last_error() == b"rule: expected one of received, exp, causal, got number 7"
    assert select(core, 3, tokens=513)[0] == INVALID
    assert core.m3_last_error() == b"tokens: expected 1..512, got 513"
    assert select(core, 3, workers=0)[0] == INVALID


def decode(core, bits: int = 4):
    coarse = np.arange(2 * 16 * 4, dtype=np.float32).reshape(2, 16, 4)
    fine = 1000 * np.arange(2 * 16 * 4, dtype=np.float32).reshape(2, 16, 4)
    codes = np.array([0x21, 0x43], np.uint8)  # coarse 1 and 2, fine 3 and 4: lowest bits first
    out = np.full((1, 8), np.nan, np.float32)
    book = Book(8, bits, 2, 4, F32, pointer(coarse), pointer(fine), None)
    p = VqParams(1, book, F32, pointer(codes), pointer(out), 2)
    status = core.m3_vq_dequantize_cpu(byref(p))
    return status, out[0], np.concatenate([coarse[0, 1] + fine[0, 3], coarse[1, 2] + fine[1, 4]])


def test_decode(core, level):
    for name in _load.available_simd_levels():
        core.m3_set_simd(name.encode())
        status, out, wanted = decode(core)
        assert status == OK and np.array_equal(out, wanted)
    assert decode(core, bits=15)[0] == INVALID
    assert core.m3_last_error() == b"book: expected 4 to 14 bits, got 15 coarse and 4 fine"


def test_errors_belong_to_their_thread(core):
    assert select(core, 4)[0] == INVALID
    seen = []
    thread = threading.Thread(target=lambda: seen.append(core.m3_last_error()))
    thread.start()
    thread.join()
    assert seen == [b""] and core.m3_last_error().startswith(b"length[0]")


def test_threading_belongs_to_the_caller():
    """A hook that cuts the work into single steps, backwards, in a process of its own: the same result, also where two
    records want one slot (the later one stays, whoever comes first)."""
    code = """
import ctypes, numpy as np
from ctypes import CFUNCTYPE, c_int64, c_void_p
core = ctypes.CDLL({library!r})
Range = CFUNCTYPE(None, c_void_p, c_int64, c_int64)
calls = []
@CFUNCTYPE(None, c_int64, c_int64, Range, c_void_p)
def hook(n, grain, body, context):
    for i in reversed(range(n)):
        calls.append(i)
        body(context, i, i + 1)
class P(ctypes.Structure):
    _fields_ = [(n, c_int64) for n in "NTHKDe"] + [(n, c_void_p) for n in "kvio"]
    _fields_ += [("s", c_int64 * 3), ("t", c_int64 * 3)]
rng = np.random.default_rng(0)
k, v = rng.standard_normal((2, 40, 3, 3, 512)).astype(np.float32)
index = rng.integers(0, 3, (40, 3, 4)).astype(np.int32)
def gather():
    out = np.zeros((40, 2, 3, 4, 512), np.float32)
    at = [a.ctypes.data for a in (k, v, index, out)]
    stride = (c_int64 * 3)(3 * 3 * 512, 3 * 512, 512)
    assert core.m3_gather_memory_cpu(ctypes.byref(P(40, 3, 3, 4, 512, 4, *at, stride, stride))) == 0
    return out
serial = gather()
core.m3_set_parallel(hook)
assert np.array_equal(gather(), serial) and calls == list(reversed(range(240))), calls[:5]
class S(ctypes.Structure):
    _fields_ = [(n, c_int64) for n in "SNd"] + [("size", c_int64 * 8), ("e", c_int64)]
    _fields_ += [(n, c_void_p) for n in "rsa"] + [(n, c_int64) for n in "tu"] + [("x", c_int64 * 8), ("y", c_int64 * 8)]
size = 40000
arena, records = np.zeros((2, size), np.uint8), np.repeat(np.arange(1, 4, dtype=np.uint8), size).reshape(3, size)
slots, one = np.array([1, 1, 0], np.int32), (c_int64 * 8)(1)
p = S(2, 3, 1, (c_int64 * 8)(size), 1, *[a.ctypes.data for a in (records, slots, arena)], size, size, one, one)
for install in (None, hook):
    arena[:] = 0
    core.m3_set_parallel(install)
    assert core.m3_scatter_memory_cpu(ctypes.byref(p)) == 0
    assert (arena[0] == 3).all() and (arena[1] == 2).all(), arena
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{library!r}", repr(str(_load.CPU_LIBRARY)))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr


def exported(library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def declared(headers) -> set[str]:
    texts = (header.read_text() for header in headers)
    return {name for text in texts for name in re.findall(r"M3_API [\w* ]+?\b(m3_\w+)\(", text)}


def test_only_our_names_are_exported():
    names = exported(_load.CPU_LIBRARY)
    assert "m3_select_tokens_cpu" in names
    assert [n for n in names if not n.startswith("m3_")] == []


def test_every_declared_function_is_exported():
    headers = (h for h in INCLUDE.glob("m3/*.h") if h.name != "cuda.h")
    assert declared(headers) == exported(_load.CPU_LIBRARY)


def test_every_function_declared_for_cuda_is_exported():
    if _cuda.reason():
        pytest.skip(_cuda.reason())
    assert declared([INCLUDE / "m3" / "cuda.h"]) == exported(_cuda.library_path())
