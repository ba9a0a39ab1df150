"""The arithmetic of the benchmarks, and the shape of what they write; never a time."""

import json
import mmap
import os
import statistics
from dataclasses import replace

import pytest
import torch
from engine.common import HashEmbedder, make_bank, make_model, prompt
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import dispatch, engine, environment, loop, measure, report
from bench.ceilings import Ceilings
from bench.evict import device_bytes, evict
from bench.peers import PEERS, Peer
from bench.peers.llama import LlamaCpp
from bench.timing import Summary, interleave, quantile, ratios
from memory3_kernels import _load
from memory3_kernels._registry import OPS, Cost
from memory3_kernels.testing.compare import as_tuple


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
        "bytes_loaded": loaded, "read": loaded // 2, "load": 0.5, "times": times,
    }  # fmt: skip


def test_summary_of_an_arm():
    base = [made_up_run(1.0), made_up_run(2.0), made_up_run(4.0)]
    runs = [made_up_run(2.0, 400, decode=1.5), made_up_run(2.5, 400, decode=2.0), made_up_run(4.0, 400, load=0.1)]
    row = engine.summary(runs, base, chunks=4)
    assert row["tokens_per_s"] == 128 / 2.5 and row["wall_s"] == 2.5 and row["ttft_s"] == 2.5 / 4
    assert row["ratio"] == 0.8, "the median of 0.5, 0.8 and 1.0; not the ratio of the medians"
    assert row["cpu_ratio"] == 0.8 and row["cpu_s"] == 2.5
    assert row["bytes_per_chunk"] == 100 and row["device_bytes"] == 200 and row["runs"] == 3
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
    assert (args.command, args.batch, args.json, args.runs, args.tokens) == ("engine", [1, 8], "x.json", 9, 128)
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
    assert (
        by["warm"]["retrievals"] == by["cold"]["retrievals"] == by["disk"]["retrievals"] == 2
        and by["rag"]["retrievals"] == 2
    )
    assert by["warm"]["bytes_loaded"] == 0 < by["cold"]["bytes_loaded"] == by["disk"]["bytes_loaded"]
    assert by["cold"]["bytes_per_chunk"] == by["cold"]["bytes_loaded"] / 4
    assert by["warm"]["kv_bytes"] > by["none"]["kv_bytes"] and by["rag"]["kv_bytes"] > by["warm"]["kv_bytes"]


CEILINGS = Ceilings(1, 20.0, 19.0, 200.0, 1 << 25, 1 << 28)
SMALL = OPS["merge_attention_states"]


def bench_case(op, part=""):
    return next(c for c in op.cases() if c.bench and part in c.id)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    """Off by more than the tolerance (here: one that float32 cannot meet), and there is no number."""
    monkeypatch.setattr(measure, "timer", lambda *_: pytest.fail("timed before the gate"))
    op = replace(SMALL, tolerance={torch.float32: 1e-12})
    with pytest.raises(AssertionError, match="on reference, output 0"):
        measure.measure(op, bench_case(op), torch.float32, levels=[], states=["hot"], rounds=1, ceilings=CEILINGS)


def test_a_wrong_peer_is_not_timed(monkeypatch):
    def wrong(out_a, lse_a, out_b, lse_b):
        return Peer(lambda: out_a, lambda out: out, (out_a,))

    monkeypatch.setitem(measure.PEERS, SMALL.name, (wrong,))
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed before the gate"))
    with pytest.raises(AssertionError, match="peer wrong"):
        measure.measure(SMALL, bench_case(SMALL), torch.float32, levels=[], states=["hot"], rounds=1, ceilings=CEILINGS)


def test_records(monkeypatch):
    """What each record says follows from its time, the op's own counts and the ceilings."""
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 26)
    level = _load.available_simd_levels()[-1:]
    rows = measure.measure(
        SMALL, bench_case(SMALL), torch.float32, levels=level, states=["hot", "cold"], rounds=2, ceilings=CEILINGS
    )
    assert [(r["backend"].split("-")[0], r["state"]) for r in rows] == [
        *(("native", "hot") for _ in level), ("reference", "hot"), *(("native", "cold") for _ in level),
    ]  # fmt: skip
    for r in rows:
        assert r["bytes"] > 0 and r["gb_per_s"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)
        assert r["read_share"] == pytest.approx(r["gb_per_s"] / CEILINGS.read_gb_s)
        assert r["ms_p20"] <= r["ms"] <= r["ms_p80"] and r["gate"] == "passed" and len(r["source"]) == 16
        assert r["peer"] is None and r["peer_ratios"] == {}
        assert r["tflop_per_s"] == pytest.approx(r["gflop_per_s"] / 1e3)
        assert r["simd"] == (None if r["backend"] == "reference" else r["backend"].removeprefix("native-"))
    json.dumps(rows)


def test_peer_ratios_are_taken_round_by_round():
    seen = {"native-x": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 16.0], "reference": [9.0, 9.0, 9.0]}
    about = {"op": SMALL.name, "case": "c", "dtype": "float32", "state": "hot"}
    rows = measure.records(about, seen, ["peer"], Cost(10**9, 10**9), CEILINGS, 3)
    by = {r["backend"]: r for r in rows}
    assert by["native-x"]["peer"] == "peer" and by["native-x"]["peer_ratio"] == 3.0
    assert by["reference"]["peer_ratio"] is None and by["peer"]["peer"] is None and by["peer"]["kind"] == "peer"
    assert by["native-x"]["gb_per_s"] == 0.5 and by["native-x"]["read_share"] == 0.025


def test_cold_operands_are_copies_that_keep_views():
    """Together they hold what was asked for; strides and storage shared between arguments stay as they were."""
    arena = torch.randn(4, 2, 8)
    args, kwargs = (arena[:, 0], arena[:, 1], None), {"scale": 1.0}
    assert measure.copies(args, kwargs, 100, "hot") == [(args, kwargs)]
    found = measure.copies(args, kwargs, measure.COLD_BYTES // 3, "cold")
    assert len(found) == 4
    for (k, v, none), same in found[1:]:
        assert k.stride() == args[0].stride() and none is None and same == kwargs
        assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() != arena.untyped_storage().data_ptr()
        assert torch.equal(k, args[0]) and torch.equal(v, args[1])
    assert len(measure.copies(args, kwargs, 1, "cold")) == measure.MOST_COPIES


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_emptiest_case(op):
    """Every op has a case whose call costs dispatch alone."""
    case = dispatch.emptiest(op, op.dtypes[0])
    args, kwargs = measure.operands(case, op.dtypes[0])
    assert op.cost(*args, **kwargs).flops == 0


def test_every_op_is_benchmarked_and_every_peer_serves_a_case():
    assert all(any(case.bench for case in op.cases()) for op in OPS.values())
    assert set(PEERS) <= set(OPS)


@pytest.mark.parametrize("name", [name for name, peers in PEERS.items() for _ in peers[:1]])
def test_peers_agree_with_their_op(name):
    """The smallest benchmark case of the op that a peer takes: all that take it are right."""
    op = OPS[name]
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    made = [measure.operands(case, dtype) for case in op.cases() if case.bench and "D128" not in case.id]
    made.sort(key=lambda one: op.cost(*one[0], **one[1]).bytes)
    assert any(measure.peers_of(op, [one], as_tuple(op(*one[0], **one[1]))) for one in made)


def test_run_smoke_writes_a_document(tmp_path, capsys):
    if not _load.available_simd_levels():
        pytest.skip("M3_NATIVE=0")
    path = tmp_path / "run.json"
    line = ["run", "--suite", "smoke", "--op", SMALL.name, "--dtype", "float32", "--rounds", "1", "--json", str(path)]
    assert command.main(line) == 0
    read = json.loads(path.read_text())
    assert read["schema"] == report.SCHEMA and read["ceilings"][0]["read_gb_s"] > 0
    assert read["ceilings"][0]["copy_gb_s"] > 0 and read["ceilings"][0]["matmul_gflop_s"] > 0
    assert read["dispatch"][0]["op"] == SMALL.name and {r["backend"].split("-")[0] for r in read["rows"]} == {
        "native", "reference",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "ceilings" in shown and SMALL.name in shown
    with pytest.raises(SystemExit, match="--case: expected"):
        command.main(["run", "--case", "no such case"])
    with pytest.raises(SystemExit, match="--levels: expected"):
        command.main(["run", "--levels", "mmx"])


def test_gpu_suite_is_gpu_check(monkeypatch, capsys):
    monkeypatch.setattr("bench.gpu.check.missing", lambda: "no device here")
    assert command.main(["run", "--suite", "gpu"]) == 2
    assert "no device here. Nothing was checked" in capsys.readouterr().err


def test_source_hash_follows_the_sources():
    assert environment.source_hash("memory_decode") != environment.source_hash("memory_attention")


def test_evicted_pages_come_from_the_device_again(tmp_path):
    """Also those that a mapping of this process held."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 22))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = bytes(mapped)
        evict(path)
        read = device_bytes()
        if bytes(mapped) != before:
            pytest.fail("the file changed")
        if device_bytes() == read:
            pytest.skip("this file system keeps files in memory")
        assert device_bytes() - read >= 1 << 22


class FakeLlama:
    def generate(self, ids, new):
        return {"prefill_s": 0.25, "decode_s": 0.75, "ids": list(range(new))}


def test_loop_rows(capsys):
    """Every arm at every batch, llama.cpp beside them at batch 1; bandwidth counts the weights of a step."""
    model = make_model()
    rows = loop.measure({"dense": model}, FakeLlama(), [prompt(32, 1), prompt(32, 2)], [1, 2], 16, 2, CEILINGS)
    by = {(r["arm"], r["batch"]): r for r in rows}
    assert list(by) == [("dense", 1), ("dense", 2), ("llama.cpp", 1)]
    peer, own = by["llama.cpp", 1], by["dense", 2]
    assert peer["tokens_per_s"] == 16 and peer["step_ms"] == 50 and peer["prefill_tokens_per_s"] == 64
    assert peer["ratio"] == 1 and peer["weight_bytes"] is None and peer["gb_per_s"] is None
    assert own["ratio"] == pytest.approx(own["tokens_per_s"] / 16, rel=0.5) and own["batch_ratio"] > 0
    assert own["gb_per_s"] == pytest.approx(own["weight_bytes"] / own["step_ms"] / 1e6)
    assert own["weight_bytes"] == loop.weight_bytes(model) > 0
    loop.show(rows, CEILINGS)
    assert "llama.cpp, batch 1" in capsys.readouterr().out


def test_llama_in_another_process_says_why_it_ended(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho \'{"version": "0"}\'\nexit 3\n')
    fake.chmod(0o755)
    with LlamaCpp(fake, "model.gguf", 1) as peer:
        assert peer.about == {"version": "0"}
        with pytest.raises(RuntimeError, match="ended with status 3"):
            peer._read()
