"""What of memory3_kernels works on this machine, and why the rest does not.

    python -m memory3_kernels.doctor [--json]

Exit code 0 where the native kernels are in use, 1 where they are not (every op then runs on its PyTorch reference).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import memory3_kernels

from . import numpy_api

WITHOUT_TORCH = "torch is not installed: pip install 'torch>=2.13'"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _simd_note(wanted: str | None, used: str | None, available: list[str]) -> str | None:
    """Why M3_SIMD has no effect, or None."""
    from ._load import SIMD_LEVELS

    if wanted is None or used is None or wanted in available:
        return None
    if wanted not in SIMD_LEVELS:
        return f"M3_SIMD={wanted!r} is not one of {', '.join(SIMD_LEVELS)}; {used} is used"
    return f"M3_SIMD={wanted} is more than this CPU or build has; {used} is used"


def _torch_part() -> dict[str, Any]:
    import torch

    from . import _load
    from ._backends import choose, forced
    from ._registry import OPS

    ops = {}
    for name, op in sorted(OPS.items()):
        try:
            backend = choose(op, ())
        except RuntimeError as error:
            backend = f"none: {error}"
        if backend == "native" and "CPU: " not in torch._C._dispatch_dump(f"memory3::{name}"):
            backend = "reference"
        ops[name] = backend + (" (forced)" if forced(name) else "")
    available = _load.available_simd_levels()
    return {
        "torch": torch.__version__,
        "native": {
            "reason": _load.native_reason(),
            "version": _load.native_version(),
            "libraries": {p.name: str(p) if p.is_file() else None for p in (_load.CPU_LIBRARY, _load.TORCH_LIBRARY)},
        },
        "simd": {
            "available": available,
            "used": _load.simd_level(),
            "note": _simd_note(os.environ.get("M3_SIMD"), _load.simd_level(), available),
        },
        "ops": ops,
        "threads": torch.get_num_threads(),
    }


def examine() -> dict[str, Any]:
    """The report as plain data: versions, native libraries, SIMD levels, numpy module, backend of each op, CPU.

    `report["native"]["reason"]` is None where the native kernels are in use, else why they are not.
    """
    report: dict[str, Any] = {
        "memory3_kernels": memory3_kernels.__version__,
        "python": platform.python_version(),
        "torch": None,
        "native": {"reason": WITHOUT_TORCH, "version": None, "libraries": {}},
        "simd": {"available": [], "used": None, "note": None},
        "ops": {},
        "threads": None,
    }
    if find_spec("torch") is not None:
        report |= _torch_part()
    report["numpy_module"] = {"reason": numpy_api.unavailable_reason()}
    report["cpu"] = {"model": _cpu_model(), "cores": os.cpu_count(), "machine": platform.machine()}
    names = ("M3_NATIVE", "M3_SIMD", "M3_BACKEND", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    report["environment"] = {name: os.environ[name] for name in names if name in os.environ}
    return report


def render(report: dict[str, Any]) -> str:
    """The report for people, one fact a line."""
    native, simd, numpy_module = report["native"], report["simd"], report["numpy_module"]
    lines = [
        f"memory3_kernels {report['memory3_kernels']}, Python {report['python']}, torch {report['torch'] or 'missing'}",
        f"CPU             {report['cpu']['model']}, {report['cpu']['cores']} cores, threads used: {report['threads']}",
        f"native kernels  {'not in use: ' + native['reason'] if native['reason'] else 'in use, ' + native['version']}",
    ]
    lines += [f"  {name:15s} {path or 'missing'}" for name, path in native["libraries"].items()]
    if simd["used"]:
        lines.append(f"SIMD            {simd['used']} (this machine can run: {', '.join(simd['available'])})")
    if simd["note"]:
        lines.append(f"                {simd['note']}")
    state = "not loaded: " + numpy_module["reason"] if numpy_module["reason"] else "loaded"
    lines.append(f"numpy module    {state}")
    if report["ops"]:
        lines.append("ops")
        lines += [f"  {name:25s} {backend}" for name, backend in report["ops"].items()]
    if report["environment"]:
        lines.append("environment     " + " ".join(f"{k}={v}" for k, v in report["environment"].items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m memory3_kernels.doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 1 if report["native"]["reason"] else 0


if __name__ == "__main__":
    sys.exit(main())
