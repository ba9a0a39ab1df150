"""Compiles the native parts with ninja: the torch-free core, its torch binding and its numpy module.

    python _build/native.py            build in place (what `pip install -e .` and `make build` do)
    python _build/native.py --commands print the compiler lines and stop

Products, all inside `memory3_kernels/lib/` but the last:
    libm3_cpu.so     csrc/common and csrc/<op>: no torch; `*.simd.cpp` once per SIMD level
    libm3_torch.so   csrc/torch: LibTorch stable ABI (floor 2.13), loads under any later torch
    _numpy.*.so      csrc/numpy: pybind11, one per Python version (beside the package's modules)
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import find_torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
VERSION = (ROOT / "VERSION").read_text().strip()
TORCH_FLOOR = "0x020d000000000000"  # 2.13: what the binding may use, whatever torch it is built against

# Flags per SIMD level. No -march=native anywhere: a wheel built here must start on any x86-64.
LEVELS = {"none": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    LEVELS["avx512bf16"] = [*LEVELS["avx512"], "-mavx512bf16", "-mavx512vnni"]


def jobs() -> int:
    """Parallel compiler processes: MAX_JOBS, else the cores, held below free memory / 1 GiB."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return max(1, min(os.cpu_count() or 1, int(free * 0.6) >> 30))


class Ninja:
    """Collects the edges of a build.ninja."""

    def __init__(self, out: Path, cxx: str):
        self.out, self.lines = (
            out,
            [
                "ninja_required_version = 1.5",
                f"rule cc\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  description = compile $out\n  depfile = $out.d\n  deps = gcc",
                f"rule link\n  command = {cxx} -shared $in $flags -o $out\n  description = link $out",
            ],
        )
        self.products: list[Path] = []

    def compile(self, source: Path, flags: list[str], tag: str = "") -> str:
        obj = self.out / "obj" / (str(source.relative_to(CSRC)).replace("/", "__") + tag + ".o")
        self.lines.append(f"build {obj}: cc {source}\n  flags = {' '.join(flags)}")
        return str(obj)

    def link(self, target: Path, objects: list[str], flags: list[str], after: tuple[Path, ...] = ()) -> Path:
        implicit = (" | " + " ".join(map(str, after))) if after else ""
        self.lines.append(f"build {target}: link {' '.join(objects)}{implicit}\n  flags = {' '.join(flags)}")
        self.products.append(target)
        return target

    def run(self, list_commands: bool = False) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for product in self.products:
            product.parent.mkdir(parents=True, exist_ok=True)
        (self.out / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        tool = ["-t", "commands"] if list_commands else ["-j", str(jobs())]
        subprocess.run([*command, "-C", str(self.out), *tool], check=True)


def build(package_dir: Path, work_dir: Path, list_commands: bool = False) -> list[Path]:
    """Builds every native product into `package_dir` (a memory3_kernels folder); returns their paths.

    Raises:
        RuntimeError: no torch headers, or no C++ compiler, were found.
        subprocess.CalledProcessError: a compiler failed (its output is on the terminal).
    """
    torch_dir = find_torch.find()
    if torch_dir is None:
        raise RuntimeError(
            "torch >= 2.13 is needed to build: pip install 'torch>=2.13', or set M3_TORCH_DIR to its folder"
        )
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise RuntimeError(f"no C++ compiler: {cxx!r} is not on PATH (apt-get install g++, or set CXX)")

    common = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno",
              f"-I{CSRC}/include", f"-I{CSRC}", f'-DM3_VERSION=\\"{VERSION}\\"']  # fmt: skip
    if len(LEVELS) > 1:
        common.append("-DM3_HAVE_X86_LEVELS")
    ninja = Ninja(work_dir.resolve(), cxx)
    lib_dir = package_dir.resolve() / "lib"

    core = []
    for source in sorted(p for p in CSRC.glob("*/*.cpp") if p.parent.name not in ("torch", "numpy")):
        if source.name.endswith(".simd.cpp"):
            for level, flags in LEVELS.items():
                # -Wno-psabi: vectors never cross a translation unit. -Wno-maybe-uninitialized: GCC 12's own intrinsics.
                quiet = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
                core.append(ninja.compile(source, [*common, *flags, f"-DM3_LEVEL={level}", *quiet], f".{level}"))
        else:
            core.append(ninja.compile(source, [*common, "-fno-exceptions"]))
    libcpu = ninja.link(lib_dir / "libm3_cpu.so", core, [
        "-Wl,-soname,libm3_cpu.so", f"-Wl,--version-script={CSRC}/exports.map", "-static-libstdc++", "-static-libgcc",
        "-Wl,-z,defs"])  # fmt: skip

    binding = [*common, "-O1"]  # bindings only move pointers; their headers are what takes time
    stable = [*binding, "-isystem", f"{torch_dir}/include", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}",
              "-DTORCH_STABLE_ONLY"]  # fmt: skip
    objects = [ninja.compile(source, stable) for source in sorted((CSRC / "torch").glob("*.cpp"))]
    here = "-Wl,-rpath,'$$ORIGIN'"
    ninja.link(lib_dir / "libm3_torch.so", objects, [
        f"-L{lib_dir}", "-lm3_cpu", f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10", here, "-Wl,-z,defs"],
        after=(libcpu,))  # fmt: skip

    sources = sorted((CSRC / "numpy").glob("*.cpp"))
    if sources:
        import pybind11

        flags = [*binding, "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
        objects = [ninja.compile(source, flags) for source in sources]
        name = "_numpy" + sysconfig.get_config_var("EXT_SUFFIX")
        ninja.link(package_dir.resolve() / name, objects, [f"-L{lib_dir}", "-lm3_cpu", "-Wl,-rpath,'$$ORIGIN/lib'"],
                   after=(libcpu,))  # fmt: skip
    ninja.run(list_commands)
    return ninja.products


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="print the compiler lines, build nothing")
    build(ROOT / "memory3_kernels", ROOT / "build" / "native", parser.parse_args().commands)
