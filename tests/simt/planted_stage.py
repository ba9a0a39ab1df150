"""One stage of the proof on one op, in a process of its own:
`python -m simt.planted_stage STAGE OP LIBRARY CSRC OUT [CASE ...]`.

Ends with status planted.FOUND, saying what was found, or with 0. bfloat16 and a head dimension of 80, the one shape
that these builds have.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import test_ops
import torch

from memory3_kernels._registry import OPS
from memory3_kernels.testing.compare import as_tuple

from . import build, cases, host, nvcc
from .planted import FOUND, SEEDS


def runs(stage: str, op: str):
    """Contexts to run every case in, each with its name."""
    if stage == "schedule":
        for order in host.ORDERS[1:]:
            for seed in range(SEEDS if order == "random" else 1):
                yield f"{order} {seed}", lambda order=order, seed=seed: host.schedule(order, seed)
    elif stage == "ptx":
        from . import ptx

        @contextmanager
        def checked():
            with ptx.running(op, one_shape=True) as run:
                yield
            for kernel, result in run.results:
                for finding in result.findings:
                    raise AssertionError(f"{kernel}: {finding}")

        yield "ptx", checked
    else:
        yield "forward", nullcontext


def chosen(op: str, names: list[str]) -> list:
    """The op's sample calls of these names (none: all).

    Raises:
        ValueError: there is none of some name.
    """
    found = [case for case in cases.cases(op, 80) if not names or case.id in names]
    if missing := set(names) - {case.id for case in found}:
        raise ValueError(f"{op} has no case {', '.join(sorted(missing))}")
    return found


def resources(op: str) -> int:
    from test_cuda_compile import test_resources

    try:
        test_resources(op, 80, lambda name, value: None)
    except AssertionError as error:
        print(error)
        return FOUND
    return 0


def main() -> int:
    stage, op, library, csrc, out, *names = sys.argv[1:]
    build.CSRC, nvcc.OUT = Path(csrc), Path(out)
    if stage == "resources":
        return resources(op)
    torch.set_num_threads(1)
    # Outputs that nobody writes show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    host.load(Path(library))
    for case in chosen(op, names):
        for name, context in runs(stage, op):
            args, kwargs = test_ops.make(case, torch.bfloat16)
            before = test_ops.clone(args)
            try:
                with context():
                    actual = as_tuple(host.call(op, *args, **kwargs))
                actual += tuple(args[i] for i in OPS[op].mutates)
                test_ops.check(OPS[op], actual, before, kwargs, OPS[op].tolerance[torch.bfloat16])
            except Exception as error:
                print(f"{case.id}, {name}: {type(error).__name__}: {error}")
                if not isinstance(error, (AssertionError, RuntimeError)) and type(error).__module__ == "builtins":
                    traceback.print_exc()
                    return 1  # ours, not the kernel's
                return FOUND
    return 0


if __name__ == "__main__":
    sys.exit(main())
