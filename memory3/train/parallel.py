"""One process or several under `torchrun`: who am I, sums over all, gradients averaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """rank 0..size-1 of this process; device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: str | None = None) -> World:
        """From torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK): gloo on CPUs, nccl on GPUs; else one process.

        device: "cpu" or "cuda"; None: CUDA where there is some.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(where)
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(rank, size, where)

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that the first process runs before the others do: it leaves files that they only read."""
        if not self.first:
            torch.distributed.barrier()
        yield
        if self.first and self.size > 1:
            torch.distributed.barrier()

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all processes, in fp64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def quiet(self, module: nn.Module):
        """A block whose backward passes stay local: all but a step's last micro-batch."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
