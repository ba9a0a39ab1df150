"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from memory3 import data

README = (Path(__file__).parents[2] / "README.md").read_text()

PREPARE = """
from memory3 import load_model as _load
from memory3.bank.build import build_bank
from memory3.data import Entry
texts = ["Niamey is the capital and largest city of Niger.", "Ufa is the capital of Bashkortostan.",
         "An enzyme is a protein.", "Gdansk lies on the Baltic coast.", "A walrus has tusks."]
build_bank("my.bank", [Entry("", t) for t in texts], _load("smollm2-135m"), progress=False)
"""


def test_the_first_example_runs(tmp_path):
    if data.missing():
        pytest.skip(f"demo packages are not installed: {data.install_command()}")
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + example], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[b'") >= 2 and "capital" in done.stdout


def test_commands_and_variables_exist():
    from typer.main import get_command

    from memory3.cli.app import app

    commands = get_command(app).commands
    named = set(re.findall(r"^memory3 (\w+)", README, re.MULTILINE)) | set(re.findall(r"`memory3 (\w+)", README))
    assert named and named <= set(commands), named - set(commands)
    root = Path(__file__).parents[2]
    files = [p for folder in ("memory3", "memory3_kernels", "_build", "csrc") for p in (root / folder).rglob("*")]
    sources = "".join(p.read_text() for p in files if p.suffix in (".py", ".cpp"))
    for variable in set(re.findall(r"`(M3_\w+)", README)):
        assert variable in sources, variable


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (Path(__file__).parents[2] / target).exists(), target
