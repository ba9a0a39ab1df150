"""Triton kernels on Triton's interpreter, in a process of its own: it is chosen when a kernel is imported, and those of
this process are compiled by other tests (interpreted.py and interpreter_rules.py have the tests)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memory3_kernels import triton

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["interpreter_rules.py", "interpreted.py"])
def test_in_its_own_process(file):
    if triton.missing():
        pytest.skip(triton.missing())
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", str(HERE / file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-6000:] + done.stderr[-6000:]
