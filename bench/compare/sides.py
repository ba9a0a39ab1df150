"""Trees of two commits, built, and the processes that time them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).resolve().parents[2]


class Side(Protocol):
    """What the gate compares: seconds of a call of a case."""

    def seconds(self, case: str) -> float: ...


def export(ref: str, folder: Path, repository: Path = ROOT) -> Path:
    """The files of a commit in `folder`; leaves no trace in the repository. Raises ValueError for an unknown one."""
    folder.mkdir(parents=True)
    archive = subprocess.Popen(["git", "-C", str(repository), "archive", ref], stdout=subprocess.PIPE)
    unpacked = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=False)
    archive.stdout.close()
    if archive.wait() or unpacked.returncode:
        raise ValueError(f"git archive could not read {ref!r}: expected a commit, branch or tag of {repository}")
    return folder


def build(tree: Path) -> None:
    """Its native CPU libraries, into the tree. Raises RuntimeError with the compiler's last lines."""
    done = subprocess.run(
        [sys.executable, "_build/native.py"], cwd=tree, env=os.environ | {"M3_CUDA": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{tree.name} does not build:\n" + "\n".join(done.stdout.splitlines()[-20:]))


class WorkerSide:
    """A worker process on a tree; a context manager. slower: a planted slowdown, for the gate's own test.

    Raises RuntimeError where the tree has no native library or its process ends.
    """

    def __init__(self, tree: Path, threads: int = 1, slower: float = 1.0) -> None:
        command = [sys.executable, str(WORKER), str(tree), "--threads", str(threads), "--slower", str(slower)]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        self._tree = tree
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._about: dict | None = None

    @property
    def cases(self) -> list[str]:
        if self._about is None:
            self._about = self._read()
            if not self._about["native"]:
                raise RuntimeError(f"{self._tree} has no native library to time")
        return self._about["cases"]

    def seconds(self, case: str) -> float:
        if case not in self.cases:
            raise ValueError(f"case: expected one of the tree's {len(self.cases)} benchmark cases, got {case!r}")
        self._process.stdin.write(json.dumps({"case": case}) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self._tree} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> WorkerSide:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Workers:
    """Base twice and head, each in a process of its own; `fresh` starts all three anew. A context manager."""

    def __init__(self, base: Path, head: Path, threads: int = 1, slower: float = 1.0) -> None:
        self._made = {"base": (base, 1.0), "again": (base, 1.0), "head": (head, slower)}
        self._threads = threads
        self._stack = ExitStack()
        self.sides: dict[str, WorkerSide] = {}  # those that run

    def fresh(self) -> dict[str, WorkerSide]:
        self._stack.close()
        self.sides = {
            name: self._stack.enter_context(WorkerSide(tree, self._threads, slower))
            for name, (tree, slower) in self._made.items()
        }
        return self.sides

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
