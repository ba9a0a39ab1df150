"""One side of a comparison: times an op's benchmark cases when asked, in a process of its own.

    PYTHONPATH=TREE python worker.py TREE --threads 1 [--slower 1.1] [--kept FOLDER]
    {"case": "memory_decode/batch8.../bfloat16"}  ->  {"seconds": ...}
    {"fresh": true}                               ->  {"cases": [...], "native": true, "pid": ...} of another process

Run by path, so that both sides are timed by the same program, whatever their own tree holds; of the tree only the
registry of ops is used. This process imports once and only waits; what times is a child of it, and a fresh one is
another child: milliseconds instead of seconds. Every child first says what it is, and a request follows the answer to
the one before, so that no child reads what is meant for the next.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import resource
import sys
import time
import traceback
import zlib
from pathlib import Path

BURSTS, BURST_S = 5, 1e-3
LONGEST_S = 0.02  # a call of many milliseconds gets fewer bursts
FRESH, END = 0, 64  # status of a child that another one follows, and of one at the end of the input


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slower", type=float, default=1.0, help="a planted slowdown: each call is waited out")
    parser.add_argument("--kept", type=Path, help="operands are made once and read from here by later processes")
    args = parser.parse_args()
    import torch

    import memory3_kernels
    from memory3_kernels._registry import OPS

    there = Path(memory3_kernels.__file__).resolve()
    if not there.is_relative_to(args.tree.resolve()):
        sys.exit(f"memory3_kernels was imported from {there}, not from {args.tree}")
    cases = {}
    for op in OPS.values():
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        for case in op.cases():
            if case.bench:
                cases[f"{op.name}/{case.id}/{str(dtype).removeprefix('torch.')}"] = (op, case, dtype)
    about = {"cases": list(cases), "native": memory3_kernels.native_reason() is None}
    gc.collect()
    gc.freeze()  # or every child would copy the pages of what its first collection looks at
    while True:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            status = 1
            try:
                status = serve(cases, about, args)
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == END:
            return 0
        if status != FRESH:
            return status if status > 0 else 128 - status  # as a shell says a signal


def serve(cases: dict[str, tuple], about: dict, args: argparse.Namespace) -> int:
    """Answers requests; FRESH or END by what ended them."""
    import torch

    elsewhere = displaced()  # noqa: F841  (kept as long as the process)
    torch.set_num_threads(args.threads)
    held, ready = None, None
    answer(about | {"pid": os.getpid()})
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if asked.get("fresh"):
                return FRESH
            if asked["case"] != held:  # only the last one's: some are hundreds of megabytes
                held, ready = asked["case"], None
                op, case, dtype = cases[held]
                file = args.kept and args.kept / f"{held.replace('/', '.')}.pt"
                ready = operands(case, dtype, file)
            answer({"seconds": best(op, *ready, args.slower, args.threads == 1)})
    return END


def answer(what: dict) -> None:
    print(json.dumps(what), flush=True)


def displaced() -> list:
    """Memory of random sizes, on the heap and by pages: what is allocated later lies elsewhere in every process."""
    return [bytearray(random.randrange(1 << 16)), mmap.mmap(-1, mmap.PAGESIZE * random.randrange(1, 1 << 10))]


def operands(case, dtype, file: Path | None) -> tuple[tuple, dict]:
    import torch

    if file and file.exists():
        return torch.load(file, weights_only=False)
    made = case.make(dtype, torch.Generator().manual_seed(zlib.crc32(case.id.encode())))
    if file:
        torch.save(made, file)
    return made


def best(op, args: tuple, kwargs: dict, slower: float, alone: bool) -> float:
    """Seconds per call in the best of some bursts: what a burst takes longer, others on the machine did.

    A call of milliseconds is never left alone on a busy machine. Time in which its processor did something else does
    not count where that can be known (alone: one thread); waits of its own accord do.
    """
    clock = time.process_time if alone else time.perf_counter
    end = clock() + LONGEST_S

    def burst(count: int) -> float:
        taken, used, begin = preempted(), time.process_time(), time.perf_counter()
        for _ in range(count):
            if slower > 1.0:
                start = time.perf_counter()
                op(*args, **kwargs)
                until = start + slower * (time.perf_counter() - start)
                while time.perf_counter() < until:
                    pass
            else:
                op(*args, **kwargs)
        seconds, used = time.perf_counter() - begin, time.process_time() - used
        return (used if alone and preempted() > taken else seconds) / count

    once = min(burst(1), burst(1))  # also brings the operands back into the caches
    count = max(1, int(BURST_S / max(once, 1e-7)))
    least = once if count == 1 else burst(count)
    for _ in range(BURSTS - 1):
        if clock() > end:
            break
        least = min(least, burst(count))
    return least


def preempted() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


if __name__ == "__main__":
    sys.exit(main())
