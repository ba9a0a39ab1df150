"""Floors and predicted times of the ops on GPUs nobody here has: bytes over bandwidth, operations over rate.

    python -m bench roofline                  all ops, shapes and devices, as Markdown
    python -m bench roofline --op memory_decode --json FILE

A floor needs the op's own count of compulsory bytes and operations (`Op.cost`) and the device's data sheet. A
prediction is the larger floor at the share of it that kernels reach (an assumption until the first `gpu-check`), plus
what starting kernels takes. The rates are those of the best instructions; the CUDA kernels use `mma.sync`, which from
compute capability 9.0 on stays below them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from memory3_kernels._registry import OPS, Cost

from ..report import write_json
from . import shapes
from .devices import DEVICES, Device

# Assumptions, not measurements: streams reach about nine tenths of a data sheet's bandwidth, attention on mma.sync
# about half of a data sheet's rate; an empty kernel takes about 2.5 us, each further one of a call about 1.5.
BANDWIDTH_SHARE = 0.9
RATE_SHARE = 0.5
FIRST_LAUNCH_US, NEXT_LAUNCH_US = 2.5, 1.5


@dataclass(frozen=True)
class Prediction:
    op: str
    shape: str
    device: str
    bytes: int
    flops: int
    memory_us: float  # floor
    compute_us: float  # floor
    predicted_us: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory_us >= self.compute_us else "compute"


def predict(cost: Cost, device: Device, launches: int = 1, moved: int | None = None) -> tuple[float, float, float]:
    """(memory floor, compute floor, prediction) in microseconds.

    Args:
        moved: bytes counted from the compiled kernel, if known; the prediction then uses them, the floor never.
    """
    memory = cost.bytes / device.gb_s / 1e3
    compute = cost.flops / device.tflops / 1e6
    streamed = (cost.bytes if moved is None else moved) / device.gb_s / 1e3
    starting = FIRST_LAUNCH_US + NEXT_LAUNCH_US * (launches - 1)
    return memory, compute, max(streamed / BANDWIDTH_SHARE, compute / RATE_SHARE) + starting


# CUDA kernels of one call at these shapes, where there is more than one (decode: parts and their merge).
LAUNCHES = {
    ("memory_decode", "llama-3-8b"): 2,
    ("memory_decode_coded", "paper"): 2,
    ("memory_decode_coded", "llama-3-8b"): 2,
    ("memory_attention_backward", "paper"): 4,
    ("memory_attention_backward", "llama-3-8b"): 4,
}


def cost_of(op: str, shape: shapes.Shape) -> Cost:
    args, kwargs = shapes.make(op, shape)
    return OPS[op].cost(*args, **kwargs)


def table(ops=tuple(shapes.CALLS), names=tuple(shapes.SHAPES), devices=tuple(DEVICES)) -> list[Prediction]:
    rows = []
    for op in ops:
        for name in names:
            cost = cost_of(op, shapes.SHAPES[name])
            for device in devices:
                times = predict(cost, DEVICES[device], LAUNCHES.get((op, name), 1))
                rows.append(Prediction(op, name, device, cost.bytes, cost.flops, *times))
    return rows


def markdown(rows: list[Prediction]) -> str:
    """One table: a line per op and shape; per device the two floors and the prediction."""
    devices = list(dict.fromkeys(r.device for r in rows))
    lines = ["| op, shape | MB | GFLOP | " + " | ".join(devices) + " |", "|---" * (3 + len(devices)) + "|"]
    for op, name in dict.fromkeys((r.op, r.shape) for r in rows):
        mine = {r.device: r for r in rows if (r.op, r.shape) == (op, name)}
        first = next(iter(mine.values()))
        cells = [f"{r.memory_us:.1f} / {r.compute_us:.1f} -> {r.predicted_us:.0f}" for r in mine.values()]
        lines.append(f"| `{op}`, {name} | {first.bytes / 1e6:.2f} | {first.flops / 1e9:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", nargs="+", choices=sorted(shapes.CALLS), default=list(shapes.CALLS), help="default: all"
    )
    parser.add_argument("--shape", nargs="+", choices=shapes.SHAPES, default=list(shapes.SHAPES), help="default: all")
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES), help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write all rows here")


def main(args: argparse.Namespace) -> int:
    rows = table(args.op, args.shape, args.device)
    print("Microseconds: memory floor / compute floor -> prediction.\n")
    print(markdown(rows))
    if args.json:
        write_json(args.json, {"rows": [asdict(row) for row in rows]})
    return 0
