"""llama.cpp in a process of its own, through another interpreter that has llama-cpp-python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOOP = Path(__file__).with_name("llama_loop.py")


class LlamaCpp:
    """A model held by llama.cpp; `generate` runs one request. Use as a context manager.

    python: an interpreter with llama-cpp-python. Its threads wait as llama.cpp likes them to: OpenMP's settings of this
    process are not handed on.

    Raises:
        RuntimeError: the process ended (its last words are part of the message).
    """

    def __init__(self, python: str | Path, model: str | Path, threads: int, context: int = 1024) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            # -I: modules of this folder (select.py) must not hide the standard library's
            [str(python), "-I", str(LOOP), str(model), str(threads), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.about = self._read()

    def generate(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        """Greedy: {"prefill_s", "decode_s", "ids"}."""
        self._process.stdin.write(json.dumps({"ids": list(ids), "new": new}) + "\n")
        self._process.stdin.flush()
        return self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process ended with status {self._process.wait()}: see its messages above")
        return json.loads(line)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.wait()
