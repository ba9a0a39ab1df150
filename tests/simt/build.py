"""Compiles the CUDA kernels and their bindings for the host of simt.h: g++ and torch's headers, no nvcc.

    PYTHONPATH=tests python -m simt.build [--sanitize] [--csrc FOLDER] [OUT]

`sanitize` adds AddressSanitizer and UndefinedBehaviorSanitizer to the kernels (the process must then start with the
sanitizer's library preloaded: `environment`). `csrc` may name a changed copy of the sources: planted bugs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "simt"

sys.path.insert(0, str(ROOT / "_build"))
import find_torch  # noqa: E402
from native import TORCH_FLOOR  # noqa: E402

# -fno-sanitize-recover: undefined behaviour ends the process, as an address error does.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def _ninja(path: Path) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    done = subprocess.run([*command, "-C", str(path), "-j", "1"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the SIMT host does not compile:\n{done.stdout}{done.stderr}")


def build(
    sanitize: bool = False,
    csrc: Path = CSRC,
    out: Path | None = None,
    ops: tuple[str, ...] = (),
    one_shape: bool = False,
) -> Path:
    """Builds what changed and returns the library.

    Args:
        sanitize: kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
        csrc: the sources.
        out: folder for objects and the library.
        ops: kernels to compile (default: all); the others' bindings are left out too.
        one_shape: bfloat16 and a head dimension of 80 only, a sixth of the work.

    Raises:
        RuntimeError: the compiler's output.
    """
    out = out or OUT / ("sanitized" if sanitize else "plain")
    out.mkdir(parents=True, exist_ok=True)
    torch_dir = find_torch.find()
    common = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DM3_SIMT", f"-I{csrc}",
              f"-I{csrc}/include", f"-I{HERE}", '-DM3_CUDA_ARCHS=\\"simt\\"']  # fmt: skip
    kernel = [*common, "-O1", "-g1", *(SANITIZERS if sanitize else []), *(["-DM3_ONE_SHAPE"] if one_shape else [])]
    binding = [*common, "-O0", "-isystem", f"{torch_dir}/include", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}",
               "-DTORCH_STABLE_ONLY"]  # fmt: skip
    lines = [
        "rule cc\n  command = g++ -MMD -MF $out.d $flags -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = g++ -shared $in $flags -o $out",
    ]
    objects = []
    kernels = sorted(p for p in csrc.glob("*/*.cu") if not ops or p.parent.name in ops)
    bindings = sorted(p for p in (csrc / "torch" / "cuda").glob("*.cpp") if not ops or p.stem in ops)
    sources = [(csrc / "common" / "cuda" / "api.cu", kernel), *((p, kernel) for p in kernels),
               (HERE / "simt.cpp", kernel), *((p, binding) for p in bindings)]  # fmt: skip
    for source, flags in sources:
        base = source.relative_to(csrc) if source.is_relative_to(csrc) else Path(source.name)
        objects.append(str(out / (str(base).replace("/", "__") + ".o")))
        lines.append(f"build {objects[-1]}: cc {source}\n  flags = {' '.join(flags)}")
    library = out / "libm3_simt.so"
    core = ROOT / "memory3_kernels" / "lib"  # the bindings' checks of values are those of the CPU launchers
    link = [*(SANITIZERS[:1] if sanitize else []), f"-L{core}", "-lm3_cpu", f"-Wl,-rpath,{core}", f"-L{torch_dir}/lib",
            "-ltorch_cpu", "-lc10", "-ldl"]  # fmt: skip
    lines.append(f"build {library}: link {' '.join(objects)}\n  flags = {' '.join(link)}")
    (out / "build.ninja").write_text("\n".join(lines) + "\n")
    _ninja(out)
    return library


def host_function(source: str, name: str, folder: Path):
    """A C function of a few lines of C++ that may include headers of csrc, compiled into `folder`."""
    (folder / f"{name}.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", str(folder / f"{name}.cpp")]
    subprocess.run([*command, "-o", str(folder / f"{name}.so")], check=True)
    return getattr(ctypes.CDLL(str(folder / f"{name}.so")), name)


def environment() -> dict[str, str]:
    """What a process that loads a sanitized library must start with."""
    preload = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        preload.append(path.strip())
    options = "detect_leaks=0:abort_on_error=0:exitcode=99"
    return os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--csrc", type=Path, default=CSRC)
    parser.add_argument("out", type=Path, nargs="?")
    options = parser.parse_args()
    print(build(options.sanitize, options.csrc, options.out))
