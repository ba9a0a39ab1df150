"""Run-time choice of the SIMD level: what M3_SIMD does, and that no wide instruction can run on a CPU without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memory3_kernels import _load

pytestmark = pytest.mark.skipif(
    os.environ.get("M3_NATIVE") == "0", reason="M3_NATIVE=0: this run covers the references"
)
X86 = platform.machine() in ("x86_64", "AMD64")
WIDE = re.compile(r"%[yz]mm\d+|%k[1-7]\b")
# AVX encodings of 128-bit instructions start with v as well; legacy SSE names do not (verr, verw are not emitted).
VEX = re.compile(r"^\s*[0-9a-f]+:\s+(v\w+)")


def functions() -> dict[str, list[str]]:
    """Disassembly of the core library, by demangled function name. Local names are in the build's objects only, so
    the library is linked without stripping."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _load.CPU_LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    found, lines = {}, []
    for line in text.splitlines():
        header = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        if header:
            lines = found.setdefault(header.group(1), [])
        elif line.strip():
            lines.append(line)
    return found


@pytest.fixture(scope="module")
def disassembly():
    if not X86 or shutil.which("objdump") is None:
        pytest.skip("this CPU has no avx2" if not X86 else "objdump is not installed")
    return functions()


def is_level(name: str, level: str) -> bool:
    return f"m3::{level}::" in name


def test_disassembly_shows_wide_code_where_it_belongs(disassembly):
    """The checks below look at something: kernels of all levels are there, all but one of them wide."""
    for level, pattern in (("avx2", r"%ymm\d"), ("avx512", r"%zmm\d"), ("avx512bf16", "bf16"), ("amx", "tdpbf16ps")):
        wide = [n for n, lines in disassembly.items() if is_level(n, level) and re.search(pattern, "\n".join(lines))]
        assert wide, f"no {level} kernel uses {pattern}"
    assert any(is_level(name, "none") for name in disassembly)


def test_baseline_code_has_no_wide_instruction(disassembly):
    """All code but the kernels of the wide levels' namespaces: it runs before, or without, the dispatch."""
    for name, lines in disassembly.items():
        if any(is_level(name, level) for level in _load.SIMD_LEVELS[1:]) or name.startswith("_"):
            continue
        for line in lines:
            assert not WIDE.search(line) and not VEX.match(line), f"{name}: {line}"


def test_avx2_code_has_no_avx512_instruction(disassembly):
    for name, lines in disassembly.items():
        if is_level(name, "avx2"):
            for line in lines:
                assert not re.search(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])", line), f"{name}: {line}"


def test_wide_kernels_are_local_to_their_namespace(disassembly):
    """A wide copy of an inline function could replace the baseline's at link time: no function outside the level
    namespaces comes from a `*.simd.cpp` file."""
    objects = Path(__file__).parent.parent / "build" / "native" / "obj"
    for path in sorted(objects.glob("*.simd.cpp.*.o")):
        level = path.name.split(".")[-2]
        listed = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "tTwWuV":
                assert is_level(name, level) or name.startswith((".L", "_GLOBAL__sub")), f"{path.name}: {kind} {name}"


def level_of_a_process(**environment) -> str:
    # Without torch: the same library, and no seconds spent on importing it.
    code = "import sys; sys.modules['torch'] = None; from memory3_kernels.numpy_api import simd_level as f; print(f())"
    clean = {k: v for k, v in os.environ.items() if k != "M3_SIMD"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_environment_chooses_the_level():
    available = _load.available_simd_levels()
    assert available[0] == "none"
    assert level_of_a_process() == available[-1]
    assert level_of_a_process(M3_SIMD="none") == "none"
    if "avx2" in available:
        assert level_of_a_process(M3_SIMD="avx2") == "avx2"


def test_unusable_level_falls_back_to_the_best():
    assert level_of_a_process(M3_SIMD="avx9000") == _load.available_simd_levels()[-1]


def test_level_is_restored_after_a_block():
    before = _load.simd_level()
    with _load.use_simd_level("none"):
        assert _load.simd_level() == "none"
    assert _load.simd_level() == before
    refusal = pytest.raises(RuntimeError, match="expected none, avx2, avx512, avx512bf16 or amx, got neon")
    with refusal, _load.use_simd_level("neon"):
        pass
    assert _load.simd_level() == before
