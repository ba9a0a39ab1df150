"""The paper's table of costs and its interval, from its shapes; what changes with a shape; break-even in any unit."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from memory3 import PRESETS
from memory3.cli.app import app
from memory3.theory import Cost, advantage, break_even, costs

PAPER = PRESETS["paper-2.4b"]


def test_the_papers_numbers():
    """Appendix A: 2.24, 0.308 and 0 TFlops to write; 0, 1.44e-4 and 0.624 to read; explicit from 0.494 to 13,400."""
    found = costs(PAPER.model, PAPER.memory)
    assert {name: (f"{c.write / 1e12:.3g}", f"{c.read / 1e12:.3g}") for name, c in found.items()} == {
        "implicit": ("2.24", "0"), "explicit": ("0.308", "0.000144"), "external": ("0", "0.624"),
    }  # fmt: skip
    low, high = advantage(found)
    assert round(low, 3) == 0.494 and round(high, -2) == 13_400, "13,388 before rounding"


def test_four_chunks_of_five_are_the_papers_reading():
    """Its remark 8: 2.884e-3 TFlops of reading for 256 tokens."""
    assert 20 * costs(PAPER.model, PAPER.memory)["explicit"].read / 1e12 == pytest.approx(2.884e-3, rel=1e-3)


def test_what_a_shape_changes():
    base = costs(PAPER.model, PAPER.memory)

    def changed(**fields):
        return costs(PAPER.model, replace(PAPER.memory, **fields))

    assert changed(tokens=16)["explicit"].read == 2 * base["explicit"].read, "twice the tokens, twice the reading"
    assert changed(tokens=16)["explicit"].write == base["explicit"].write, "but they are chosen from the same scores"
    upper = changed(layers=tuple(range(22, 44)))["explicit"]
    assert upper.read == base["explicit"].read and upper.write > 1.9 * base["explicit"].write, "lower layers run too"
    assert changed(rule="causal")["explicit"].write < base["explicit"].write
    half = tuple((0, 1, 2, 3, -1, -1, -1, -1) for _ in PAPER.memory.layers)
    assert changed(head_map=half)["explicit"].read == base["explicit"].read / 2
    assert changed(head_map=half)["external"] == base["external"]
    longer = costs(PAPER.model, PAPER.memory, train_context=4096)
    assert longer["implicit"].write > base["implicit"].write and longer["explicit"] == base["explicit"]


def test_break_even():
    memory, text = Cost(10.0, 1.0), Cost(0.0, 3.0)
    uses = break_even(memory, text)
    assert uses == 5 and memory.total(uses) == text.total(uses)
    assert memory.total(uses + 1) < text.total(uses + 1) and memory.total(uses - 1) > text.total(uses - 1)
    assert break_even(memory, Cost(0.0, 1.0)) == math.inf, "dearer to write, no cheaper to read"
    assert break_even(Cost(0.0, 1.0), memory) == 0.0, "nothing to pay back"
    assert break_even(Cost(0.0, 3.0), memory) == math.inf, "cheaper to write, dearer to read: never later on"


def invoke(*args):
    return CliRunner().invoke(app, ["theory", *args])


def test_command():
    shown = invoke("--seconds", "0.2,0.1,0.3").output
    assert "0.494 to 13,388 uses" in shown and "from 1 uses on" in shown
    read = json.loads(invoke("smollm2-135m", "--json", "--tokens", "8", "--layers", "0-14").output)
    preset = PRESETS["smollm2-135m"]
    expected = costs(preset.model, replace(preset.memory, tokens=8, layers=tuple(range(15))))
    assert read["flops"]["explicit"] == {"write": expected["explicit"].write, "read": expected["explicit"].read}
    assert read["measured"] is None and read["explicit_from_uses"] < read["explicit_to_uses"]


def test_command_refuses():
    for args in (["--seconds", "1,2"], ["--seconds", "a,b,c"], ["--layers", "0-99"]):
        failed = invoke(*args)
        assert failed.exit_code != 0 and isinstance(failed.exception, ValueError)
