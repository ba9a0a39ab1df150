"""Trees of two commits, built, and the processes that time them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
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
    """A process on a tree that imports once, and the one that times (a child of it); a context manager.

    slower: a planted slowdown, for the gate's own test. kept: a folder for operands of this tree, made once. Raises
    RuntimeError where the tree has no native library or its process ends.
    """

    def __init__(self, tree: Path, threads: int = 1, slower: float = 1.0, kept: Path | None = None) -> None:
        command = [sys.executable, str(WORKER), str(tree), "--threads", str(threads), "--slower", str(slower)]
        command += ["--kept", str(kept)] if kept else []
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before the fork; the child sets its own number
        self._tree = tree
        self._process = subprocess.Popen(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), **one}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._said: dict | None = None

    @property
    def cases(self) -> list[str]:
        return self._about()["cases"]

    @property
    def pid(self) -> int:
        """Of the process that times."""
        return self._about()["pid"]

    def seconds(self, case: str) -> float:
        if case not in self.cases:
            raise ValueError(f"case: expected one of the tree's {len(self.cases)} benchmark cases, got {case!r}")
        self._ask({"case": case})
        return self._read()["seconds"]

    def fresh(self) -> None:
        """Another process goes on; it shares the import, but what it allocates lies elsewhere."""
        self._about()  # a request too early would be read by the wrong process
        self._ask({"fresh": True})
        self._said = None

    def _about(self) -> dict:
        if self._said is None:
            self._said = self._read()
            if not self._said["native"]:
                raise RuntimeError(f"{self._tree} has no native library to time")
        return self._said

    def _ask(self, request: dict) -> None:
        with suppress(BrokenPipeError):  # it has ended, and with which status reading the answer says
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self._tree} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> WorkerSide:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(BrokenPipeError):  # what could not be written to a process that has ended
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Workers:
    """Base twice and head, each in a process of its own; `fresh` gives each another one. A context manager."""

    def __init__(self, base: Path, head: Path, threads: int = 1, slower: float = 1.0, kept: Path | None = None) -> None:
        made = {"base": (base, 1.0), "again": (base, 1.0), "head": (head, slower)}
        self._sides: dict[str, WorkerSide] = {}
        self._start = lambda: {name: WorkerSide(tree, threads, slow, kept) for name, (tree, slow) in made.items()}

    def fresh(self) -> dict[str, WorkerSide]:
        if not self._sides:
            self._sides = self._start()
        else:
            for side in self._sides.values():
                side.fresh()
        return self._sides

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for side in self._sides.values():
            side.__exit__(kind, error, trace)
