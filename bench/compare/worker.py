"""One side of a comparison: times an op's benchmark cases when asked, in a process of its own.

    PYTHONPATH=TREE python worker.py TREE --threads 1 [--slower 1.1]
    {"case": "memory_decode/batch8.../bfloat16"}  ->  {"seconds": ...}

Run by path, so that both sides are timed by the same program, whatever their own tree holds; of the tree only the
registry of ops is used. First it prints {"cases": [...]}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from pathlib import Path

BURSTS, BURST_S = 5, 1e-3
LONGEST_S = 0.02  # a call of many milliseconds gets fewer bursts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slower", type=float, default=1.0, help="a planted slowdown: each call is waited out")
    args = parser.parse_args()
    import torch

    import memory3_kernels
    from memory3_kernels._registry import OPS

    there = Path(memory3_kernels.__file__).resolve()
    if not there.is_relative_to(args.tree.resolve()):
        sys.exit(f"memory3_kernels was imported from {there}, not from {args.tree}")
    torch.set_num_threads(args.threads)
    cases = {}
    for op in OPS.values():
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        for case in op.cases():
            if case.bench:
                cases[f"{op.name}/{case.id}/{str(dtype).removeprefix('torch.')}"] = (op, case, dtype)
    ready: dict[str, tuple] = {}
    print(json.dumps({"cases": list(cases), "native": memory3_kernels.native_reason() is None}), flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            key = asked["case"]
            if key not in ready:
                op, case, dtype = cases[key]
                made = case.make(dtype, torch.Generator().manual_seed(zlib.crc32(case.id.encode())))
                ready[key] = (op, *made)
            seconds = best(*ready[key], args.slower)
            print(json.dumps({"seconds": seconds}), flush=True)


def best(op, args: tuple, kwargs: dict, slower: float) -> float:
    """Seconds per call in the best of some bursts: what a burst takes longer, others on the machine did."""
    end = time.perf_counter() + LONGEST_S

    def burst(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            if slower > 1.0:
                start = time.perf_counter()
                op(*args, **kwargs)
                until = start + slower * (time.perf_counter() - start)
                while time.perf_counter() < until:
                    pass
            else:
                op(*args, **kwargs)
        return (time.perf_counter() - begin) / count

    once = min(burst(1), burst(1))  # also brings the operands back into the caches
    count = max(1, int(BURST_S / max(once, 1e-7)))
    least = min(once, burst(count)) if count == 1 else burst(count)
    for _ in range(BURSTS - 1):
        if time.perf_counter() > end:
            break
        least = min(least, burst(count))
    return least


if __name__ == "__main__":
    main()
