"""What a number was measured on."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("memory3", "torch", "numpy", "faiss-cpu", "lmdb", "tokenizers")

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "M3_SIMD", "M3_BACKEND")


def describe() -> dict[str, Any]:
    """Versions, processor, native kernels; plain JSON types."""
    from memory3_kernels import doctor

    native = doctor.examine()["native"]
    native["libraries"] = sorted(native.get("libraries") or ())  # names; where they lie is nobody's business
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "native": native,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }  # fmt: skip


@functools.cache
def source_hash(op: str) -> str:
    """Of everything an op's native kernel and contract are made from: equal hashes, equal code."""
    found = [ROOT / "memory3_kernels/ops" / f"{op}.py", ROOT / "csrc/torch" / f"{op}.cpp"]
    for folder in (f"csrc/{op}", "csrc/common", "csrc/include"):
        found += sorted(path for path in (ROOT / folder).rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in found:
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def load_average() -> float:
    """Runnable processes over the last minute; this benchmark counts with its threads."""
    return os.getloadavg()[0]


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have used, all cores together (ticks of 10 ms)."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, _proc("stat").splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(child: int | None = None) -> float:
    """Processor seconds of this process, and of a child where its pid is given."""
    seconds = time.process_time()
    if child is not None:
        fields = _proc(f"{child}/stat").rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _proc(name: str) -> str:
    return Path("/proc", name).read_text(encoding="utf-8")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
