"""The arithmetic of the benchmarks, and the shape of what they write; never a time."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from engine.common import HashEmbedder, make_bank, make_model, prompt
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import engine, environment, report
from bench.timing import Summary, interleave, quantile, ratios
from memory3_kernels._registry import OPS


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_quartiles_are_those_of_the_standard_library(values):
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    summary = Summary.of(values)
    assert summary.low == pytest.approx(low) and summary.high == pytest.approx(high)
    assert summary.median == pytest.approx(middle) and summary.runs == len(values)


def test_summary_of_one_and_of_none():
    assert Summary.of([3.0]) == Summary(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        Summary.of([])
    assert quantile([1.0, 2.0], 1.0) == 2.0


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="one per round, got 1"):
        ratios([1.0, 2.0], [1.0])


def test_interleave():
    """Every arm once per round, another one first each time; warm-up is not kept."""
    order = []
    arms = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    seen = interleave(arms, rounds=3, warmup=1)
    rounds = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds[1:]] == ["a", "b", "c"]
    assert sorted(n for runs in seen.values() for n in runs) == list(range(4, 13))


def made_up_run(wall, loaded=0, **times):
    return {
        "new_tokens": 128, "wall_s": wall, "cpu_s": wall, "ttft_s": wall / 4, "kv_bytes": 1000, "retrievals": 3,
        "bytes_loaded": loaded, "load": 0.5, "times": times,
    }  # fmt: skip


def test_summary_of_an_arm():
    base = [made_up_run(1.0), made_up_run(2.0), made_up_run(4.0)]
    runs = [made_up_run(2.0, 400, decode=1.5), made_up_run(2.5, 400, decode=2.0), made_up_run(4.0, 400, load=0.1)]
    row = engine.summary(runs, base, chunks=4)
    assert row["tokens_per_s"] == 128 / 2.5 and row["wall_s"] == 2.5 and row["ttft_s"] == 2.5 / 4
    assert row["ratio"] == 0.8, "the median of 0.5, 0.8 and 1.0; not the ratio of the medians"
    assert row["cpu_ratio"] == 0.8 and row["cpu_s"] == 2.5
    assert row["bytes_per_chunk"] == 100 and row["runs"] == 3
    assert row["stages"] == {"decode": 1.5, "load": 0.0}
    assert engine.summary(runs, None, chunks=4)["ratio"] is None


def test_document(tmp_path):
    rows = [{"arm": "none", "batch": 1, "threads": 1, **engine.summary([made_up_run(1.0)], None, 4)}]
    path = tmp_path / "report.json"
    report.write_json(path, report.document("engine", {"tokens_in": 128}, environment.describe(), rows))
    read = json.loads(path.read_text())
    assert list(read) == ["schema", "suite", "settings", "environment", "rows"] and read["schema"] == report.SCHEMA
    assert {"cpu", "cores", "python", "packages", "native"} <= read["environment"].keys()
    assert read["environment"]["packages"]["torch"]
    assert read["rows"] == rows


def test_table_shows_every_arm(capsys):
    rows = []
    for name in engine.ARMS:
        rows.append({"arm": name, **engine.summary([made_up_run(1.0, decode=0.5)], [made_up_run(1.0)], 4)})
    engine.show(rows, batch=1, threads=1)
    shown = capsys.readouterr().out
    assert all(name in shown for name in engine.ARMS) and "1.000" in shown and "500.0" in shown


def test_command_line():
    args = command.parser().parse_args(["engine", "--batch", "1", "8", "--json", "x.json"])
    assert (args.suite, args.batch, args.json, args.runs, args.tokens) == ("engine", [1, 8], "x.json", 9, 128)
    with pytest.raises(SystemExit):
        command.parser().parse_args(["nothing"])


def test_whole_suite_on_a_tiny_model(tmp_path):
    """All arms run; memory retrieves, and a cleared arena loads every record again."""
    model, embedder = make_model(), HashEmbedder()
    prompts = [prompt(64, 1), prompt(64, 2)]
    with make_bank(tmp_path / "b", model) as bank:
        rows = engine.measure(model, bank, embedder, prompts, 64, 2, engine.ARMS, threads=1)
    by = {row["arm"]: row for row in rows}
    assert list(by) == list(engine.ARMS) and all(row["batch"] == 2 and row["runs"] == 2 for row in rows)
    assert by["none"]["ratio"] == 1.0 and by["none"]["retrievals"] == 0
    assert by["warm"]["retrievals"] == by["cold"]["retrievals"] == 2 and by["rag"]["retrievals"] == 2
    assert by["warm"]["bytes_loaded"] == 0 < by["cold"]["bytes_loaded"]
    assert by["cold"]["bytes_per_chunk"] == by["cold"]["bytes_loaded"] / 4
    assert by["warm"]["kv_bytes"] > by["none"]["kv_bytes"] and by["rag"]["kv_bytes"] > by["warm"]["kv_bytes"]


def test_ops_refuses_to_time_a_wrong_kernel(monkeypatch):
    """Off by more than the tolerance (here: one that float32 cannot meet), and there is no number."""
    from bench import ops

    op = OPS["merge_attention_states"]
    case = next(c for c in op.cases() if c.bench)
    monkeypatch.setattr(ops, "timer", lambda *_: pytest.fail("timed before the gate"))
    with pytest.raises(AssertionError, match="on reference, output 0"):
        ops.measure(replace(op, tolerance={torch.float32: 1e-12}), case, torch.float32, 1)


def test_ops_rows(monkeypatch):
    from bench import ops

    op = OPS["merge_attention_states"]
    rows = ops.measure(op, next(c for c in op.cases() if c.bench), torch.float32, 2)
    assert rows[0]["backend"] == "reference" and rows[0]["ratio"] == 1
    assert all(r["bytes"] > 0 and r["gb_per_s"] == pytest.approx(r["bytes"] / r["ms"] / 1e6) for r in rows)
    json.dumps(rows)
