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

WITHOUT_TORCH = "torch is not installed: pip install 'torch>=2.11'"


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


def _cuda_part() -> dict[str, Any]:
    import torch

    from . import _cuda
    from ._backends import has_cuda_kernel
    from ._registry import OPS

    devices = []
    for index in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        refused = _cuda.reason() or _cuda.device_refused(index)
        devices.append({"name": torch.cuda.get_device_name(index), "capability": capability, "reason": refused})
    path = _cuda.library_path()
    return {
        "reason": _cuda.reason(),
        "library": str(path) if path else None,
        "archs": _cuda.archs(),
        "devices": devices,
        "kernels": sorted(name for name in OPS if has_cuda_kernel(name)),
    }


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
            "through_dispatcher": _load.direct_reason(),
            "version": _load.native_version(),
            "libraries": {p.name: str(p) if p.is_file() else None for p in (_load.CPU_LIBRARY, _load.TORCH_LIBRARY)},
        },
        "simd": {
            "available": available,
            "used": _load.simd_level(),
            "note": _simd_note(os.environ.get("M3_SIMD"), _load.simd_level(), available),
        },
        "cuda": _cuda_part(),
        "ops": ops,
        "threads": torch.get_num_threads(),
    }


def examine() -> dict[str, Any]:
    """The report as plain data: versions, native libraries, SIMD levels, CUDA, numpy module, backend of each op, CPU.

    `report["native"]["reason"]` is None where the native kernels are in use, else why they are not, and
    `"through_dispatcher"` where plain calls skip torch's dispatcher, else why they do not; `report["cuda"]` says the
    same of the CUDA kernels, and of each device whether they were built for it.
    """
    report: dict[str, Any] = {
        "memory3_kernels": memory3_kernels.__version__,
        "python": platform.python_version(),
        "torch": None,
        "native": {"reason": WITHOUT_TORCH, "through_dispatcher": WITHOUT_TORCH, "version": None, "libraries": {}},
        "simd": {"available": [], "used": None, "note": None},
        "cuda": {"reason": WITHOUT_TORCH, "library": None, "archs": "", "devices": [], "kernels": []},
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
    if not native["reason"]:
        slow = native["through_dispatcher"]
        lines.append(f"  {'calls':15s} {f'all through the dispatcher: {slow}' if slow else 'past the dispatcher'}")
    if simd["used"]:
        lines.append(f"SIMD            {simd['used']} (this machine can run: {', '.join(simd['available'])})")
    if simd["note"]:
        lines.append(f"                {simd['note']}")
    cuda = report["cuda"]
    lines.append(f"CUDA kernels    {'not loaded: ' + cuda['reason'] if cuda['reason'] else 'for ' + cuda['archs']}")
    if cuda["library"]:
        lines.append(f"  {Path(cuda['library']).name:15s} {cuda['library']}")
    for device in cuda["devices"]:
        served = "not served: " + device["reason"] if device["reason"] else "served"
        lines.append(f"  {device['name']}, compute capability {device['capability']}: {served}")
    if not cuda["devices"]:
        lines.append("  no device")
    state = "not loaded: " + numpy_module["reason"] if numpy_module["reason"] else "loaded"
    lines.append(f"numpy module    {state}")
    if report["ops"]:
        lines.append("ops")
        for name, backend in report["ops"].items():
            lines.append(f"  {name:25s} {backend}{', cuda' if name in cuda['kernels'] else ''}")
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
