"""Compiles the native parts with ninja: the torch-free libraries, their torch bindings and the numpy module.

    python _build/native.py            build in place (what `pip install -e .` and `make build` do)
    python _build/native.py --commands print the compiler lines and stop
    python _build/native.py --emulate-avx512   AVX-512 and AMX levels emulated on AVX2, for tests: build/emulated/lib

Products, all inside `memory3_kernels/lib/` but the last:
    libm3_cpu.so     csrc/common and csrc/<op>: no torch; `*.simd.cpp` once per SIMD level
    libm3_torch.so   csrc/torch: LibTorch stable ABI (floor 2.11), loads under any later torch
    _direct.abi3.so  csrc/python: calls of libm3_torch's kernels beside torch's dispatcher (beside the package's modules)
    _numpy.*.so      csrc/numpy: pybind11, one per Python version (there, too)
and where nvcc is found (_build/cuda_build.py has the variables):
    libm3_cuda_cu13.so    csrc/**/*.cu: nvcc alone, the CUDA runtime inside, no torch; named after CUDA's major version
    libm3_torch_cuda.so   csrc/torch/cuda: g++ alone, stable ABI; loads without a GPU or a driver, under any torch

Objects lie in build/native whoever asks (pip, make, a wheel), so nothing is compiled twice.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cuda_build
import find_torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"
VERSION = (ROOT / "VERSION").read_text().strip()
TORCH_FLOOR = "0x020b000000000000"  # 2.11: what the binding may use, whatever torch it is built against

# Flags per SIMD level. No -march=native anywhere: a wheel built here must start on any x86-64.
LEVELS = {"none": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    LEVELS["avx512bf16"] = [*LEVELS["avx512"], "-mavx512bf16", "-mavx512vnni"]
    LEVELS["amx"] = [*LEVELS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
EMULATED = ROOT / "build" / "emulated"  # a folder for M3_LIB_DIR is its lib/


def emulated_levels() -> dict[str, list[str]]:
    """The AVX-512 and AMX levels as AVX2 code: for tests on a CPU without them (tests/emulation)."""
    # -O1: nobody times them, and GCC takes minutes over vectors that it has to split.
    shims = ROOT / "tests" / "emulation"
    avx512 = [*LEVELS["avx2"], "-O1", "-include", str(shims / "avx512.h")]
    bf16 = [*avx512, "-DM3_EMULATE_BF16"]
    amx = [*bf16, "-include", str(shims / "amx.h"), "-DM3_EMULATE_AMX"]
    return LEVELS | {"avx512": avx512, "avx512bf16": bf16, "amx": amx}


def jobs() -> int:
    """Parallel compiler processes: MAX_JOBS, else the cores, held below free memory / 1 GiB."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return max(1, min(os.cpu_count() or 1, int(free * 0.6) >> 30))


@contextmanager
def alone(folder: Path):
    """One build at a time in a folder: ninja itself does not mind another one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_ninja() -> list[str]:
    """This interpreter's own ninja before another on PATH: pip's builds have no other, and one of another version takes
    every object for outdated."""
    try:
        import ninja
    except ImportError:
        return [shutil.which("ninja") or "ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


class Ninja:
    """Collects the edges of a build.ninja."""

    def __init__(self, out: Path, cxx: str):
        self.out = out
        self.lines = ["ninja_required_version = 1.5"]
        self.products: list[Path] = []
        self.rule("cc", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", "compile $out", depfile=True)
        self.rule("link", f"{cxx} -shared $in $flags -o $out", "link $out")

    def rule(self, name: str, command: str, description: str, depfile: bool = False) -> None:
        self.lines.append(f"rule {name}\n  command = {command}\n  description = {description}")
        if depfile:
            self.lines[-1] += "\n  depfile = $out.d\n  deps = gcc"

    def compile(self, source: Path, flags: list[str], tag: str = "", rule: str = "cc") -> str:
        obj = self.out / "obj" / (str(source.relative_to(CSRC)).replace("/", "__") + tag + ".o")
        self.lines.append(f"build {obj}: {rule} {source}\n  flags = {' '.join(flags)}")
        return str(obj)

    def link(
        self, target: Path, objects: list[str], flags: list[str], after: tuple[Path, ...] = (), rule: str = "link"
    ) -> Path:
        implicit = (" | " + " ".join(map(str, after))) if after else ""
        self.lines.append(f"build {target}: {rule} {' '.join(objects)}{implicit}\n  flags = {' '.join(flags)}")
        self.products.append(target)
        return target

    def run(self, targets: list[Path], list_commands: bool = False) -> None:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        (self.out / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = find_ninja()
        tool = ["-t", "commands"] if list_commands else ["-j", str(jobs())]
        subprocess.run([*command, "-C", str(self.out), *tool, *map(str, targets)], check=True)


def build(
    package_dir: Path, list_commands: bool = False, work_dir: Path = WORK, emulate_avx512: bool = False
) -> list[Path]:
    """Builds every native product into `package_dir` (a memory3_kernels folder); returns their paths.

    emulate_avx512: the CPU libraries alone, for tests.
    Raises:
        RuntimeError: no torch headers, no C++ compiler, or no nvcc with M3_CUDA=1; a wrong M3_CUDA_ARCHS.
        subprocess.CalledProcessError: a compiler failed (its output is on the terminal).
    """
    torch_dir = find_torch.find()
    if torch_dir is None:
        raise RuntimeError(
            "torch >= 2.11 is needed to build: pip install 'torch>=2.11', or set M3_TORCH_DIR to its folder"
        )
    toolkit = None if emulate_avx512 else cuda_build.toolkit()
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise RuntimeError(f"no C++ compiler: {cxx!r} is not on PATH (apt-get install g++, or set CXX)")

    common = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno",
              f"-I{CSRC}/include", f"-I{CSRC}", f'-DM3_VERSION=\\"{VERSION}\\"']  # fmt: skip
    if len(LEVELS) > 1:
        common.append("-DM3_HAVE_X86_LEVELS")
    levels = LEVELS
    if emulate_avx512:
        levels = emulated_levels()
        common.append("-DM3_EMULATE_AVX512")
    ninja = Ninja(work_dir.resolve(), cxx)
    lib_dir = package_dir.resolve() / "lib"

    core = []
    for source in sorted(p for p in CSRC.glob("*/*.cpp") if p.parent.name not in ("torch", "python", "numpy")):
        if source.name.endswith(".simd.cpp"):
            for level, flags in levels.items():
                # -Wno-psabi: vectors never cross a translation unit. -Wno-...uninitialized: GCC 12's own intrinsics.
                quiet = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-fno-exceptions"]
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

    if not emulate_avx512:
        import pybind11

        python = ["-isystem", sysconfig.get_paths()["include"]]
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # such a Python has no limited API: ops take the dispatcher
            objects = [ninja.compile(CSRC / "python" / "direct.cpp", [*common, *python, "-fno-exceptions"])]
            ninja.link(package_dir.resolve() / "_direct.abi3.so", objects, ["-static-libstdc++", "-static-libgcc"])
        sources = sorted((CSRC / "numpy").glob("*.cpp"))
        flags = [*binding, "-isystem", pybind11.get_include(), *python]
        objects = [ninja.compile(source, flags) for source in sources]
        name = "_numpy" + sysconfig.get_config_var("EXT_SUFFIX")
        ninja.link(package_dir.resolve() / name, objects, [f"-L{lib_dir}", "-lm3_cpu", "-Wl,-rpath,'$$ORIGIN/lib'"],
                   after=(libcpu,))  # fmt: skip
    core_products = list(ninja.products)
    if toolkit is not None:
        add_cuda(ninja, toolkit, lib_dir, common, stable, torch_dir)
    with alone(ninja.out):
        ninja.run(core_products, list_commands)
        cuda_products = ninja.products[len(core_products) :]
        for old in lib_dir.glob("libm3_*cuda*.so"):  # of another toolkit, or of none
            if old not in cuda_products and not list_commands:
                old.unlink()
        if cuda_products:
            try:
                ninja.run(cuda_products, list_commands)
            except subprocess.CalledProcessError:
                print("The CUDA kernels did not compile (see above). M3_CUDA=0 builds without them.", file=sys.stderr)
                raise
    return ninja.products


def add_cuda(
    ninja: Ninja, toolkit: cuda_build.Toolkit, lib_dir: Path, common: list[str], stable: list[str], torch_dir: Path
) -> None:
    """libm3_cuda and its torch binding: kernels know no torch, the binding knows no nvcc."""
    host = f"-ccbin {os.environ['CXX']} " if os.environ.get("CXX") else ""
    ninja.rule("nvcc", f"{toolkit.nvcc} {host}-MMD -MF $out.d $flags -c $in -o $out", "nvcc $out", depfile=True)
    ninja.rule("nvlink", f"{toolkit.nvcc} {host}-shared $in $flags -o $out", "link $out")
    flags = ["-std=c++17", "-O3", os.environ.get("M3_NVCC_FLAGS", ""), "-Xcompiler -fPIC,-fvisibility=hidden,-Wall",
             *toolkit.targets, f"-I{CSRC}/include", f"-I{CSRC}", f"'-DM3_CUDA_ARCHS=\"{toolkit.archs}\"'"]  # fmt: skip
    objects = [ninja.compile(source, flags, rule="nvcc") for source in sorted(CSRC.rglob("*.cu"))]
    kernels = ninja.link(lib_dir / toolkit.library, objects, [
        *toolkit.targets, *toolkit.link_flags, f"-Xlinker -soname,{toolkit.library}",
        "-Xcompiler -static-libstdc++,-static-libgcc", f"-Xlinker --version-script={CSRC}/exports.map",
        "-Xlinker -z,defs"], rule="nvlink")  # fmt: skip

    objects = [ninja.compile(source, stable) for source in sorted((CSRC / "torch" / "cuda").glob("*.cpp"))]
    ninja.link(lib_dir / "libm3_torch_cuda.so", objects, [
        f"-L{lib_dir}", f"-l:{toolkit.library}", "-lm3_cpu", f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10",
        # libtorch brings libtorch_cuda with it where torch has one: the binding asks that for the current stream.
        "-Wl,--no-as-needed", "-ltorch", "-Wl,-rpath,'$$ORIGIN'", "-Wl,-z,defs"], after=(kernels, lib_dir / "libm3_cpu.so"))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="print the compiler lines, build nothing")
    parser.add_argument("--emulate-avx512", action="store_true", help="CPU libraries for tests, in build/emulated/lib")
    args = parser.parse_args()
    if args.emulate_avx512:
        build(EMULATED, args.commands, EMULATED / "work", emulate_avx512=True)
    else:
        build(ROOT / "memory3_kernels", args.commands)
