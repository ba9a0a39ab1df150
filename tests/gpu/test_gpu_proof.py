"""gpu-proof: its records, what it runs again, and its exit codes, on stages made up of tiny tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.gpu import proof

TESTS = """
import pytest, time
@pytest.mark.parametrize("op, arch", [("memory_decode", 80), ("memory_decode", 90)])
def test_one(op, arch, record_property):
    record_property("registers", 100 + arch)
def test_two(record_property):
    {body}
"""


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A stage whose second test has the body given."""
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    root = Path(__file__).parents[2]
    (tmp_path / "bench").symlink_to(root / "bench")
    (tmp_path / "memory3_kernels").symlink_to(root / "memory3_kernels")
    (tmp_path / "source").write_text("1")
    monkeypatch.setattr(proof, "STAGES", {"made-up": proof.Stage("made-up", ("test_it.py",), "tiny", ("source",))})

    def write(body: str) -> None:
        (tmp_path / "test_it.py").write_text(TESTS.replace("{body}", body))

    write("pass")
    return write


def prove(tmp_path, *more: str) -> tuple[int, dict]:
    path = tmp_path / "proof.json"
    args = ["gpu-proof", "--json", str(path), *more]
    parser = command.parser()
    parsed = parser.parse_args([*args[:3], *more])
    parsed.stage = ["made-up"]
    return proof.main(parsed), json.loads(path.read_text())


def by_test(report: dict) -> dict:
    return {row["test"].partition("::")[2]: row for row in report["rows"]}


def test_records_name_kernel_arch_stage_figures_and_verdict(stage, tmp_path, capsys):
    code, report = prove(tmp_path)
    assert code == 0 and report["suite"] == "gpu-proof"
    row = by_test(report)["test_one[memory_decode-90]"]
    assert (row["kernel"], row["arch"], row["stage"], row["verdict"]) == ("memory_decode", 90, "made-up", "passed")
    assert row["figures"] == {"registers": 190} and row["seconds"] >= 0
    assert "made-up: tiny" in capsys.readouterr().out


def test_the_summary_has_a_row_per_stage_and_kernel(stage, tmp_path):
    stage("pytest.skip('nvcc is not installed')")
    path = tmp_path / "summary.json"
    prove(tmp_path, "--summary", str(path))
    ops, rest = json.loads(path.read_text())["rows"]
    assert (ops["kernel"], ops["archs"], ops["passed"], ops["skipped"]) == ("memory_decode", [80, 90], 2, 0)
    assert (rest["kernel"], rest["passed"], rest["skipped"]) == (None, 0, 1) and len(rest["sources"]) == 1


def test_what_passed_is_kept_until_its_sources_change(stage, tmp_path):
    counter = tmp_path / "count"
    stage(f"open({str(counter)!r}, 'a').write('x')")
    assert [prove(tmp_path)[0] for _ in range(2)] == [0, 0]
    assert counter.read_text() == "x"
    (tmp_path / "source").write_text("2")
    code, report = prove(tmp_path)
    assert code == 0 and counter.read_text() == "xx" and len(report["rows"]) == 3
    assert len({row["sources"] for row in report["rows"]}) == 1


def test_a_failure_is_reported_and_run_again(stage, tmp_path, capsys):
    stage("assert 1 == 2, 'a wrong lane'")
    code, report = prove(tmp_path)
    assert code == 1 and by_test(report)["test_two"]["verdict"] == "failed"
    assert "a wrong lane" in by_test(report)["test_two"]["detail"] and "FAILED made-up" in capsys.readouterr().out
    stage("pass")
    assert prove(tmp_path)[0] == 0


def test_a_missing_tool_is_not_a_proof(stage, tmp_path):
    stage("pytest.skip('nvcc is not installed')")
    code, report = prove(tmp_path)
    assert code == 3 and by_test(report)["test_two"]["detail"] == "nvcc is not installed"


def test_time_runs_out(stage, tmp_path):
    stage("time.sleep(90)")
    code, report = prove(tmp_path, "--minutes", "0.4")
    assert code == 3 and report["left"] == {"made-up": 1}
    assert len(report["rows"]) == 2 and all(row["verdict"] == "passed" for row in report["rows"])


def test_tests_that_cannot_be_collected(stage, tmp_path, capsys):
    (tmp_path / "test_it.py").write_text("import nothing_of_this_name")
    code, _ = prove(tmp_path)
    assert code == 3 and "collected" in capsys.readouterr().out


@pytest.mark.parametrize("stage", proof.STAGES.values(), ids=list(proof.STAGES))
def test_the_real_stages_have_their_files(stage):
    """Every stage has its files, and what its records depend on."""
    for glob in (*stage.files, *(source for source in stage.sources if isinstance(source, str))):
        assert list(proof.ROOT.glob(glob)), glob
    assert len(stage.digest(None)) == 16


@pytest.mark.parametrize("stage, wanted", [("resources", "memory_decode.cu"), ("triton-ptx", "memory_decode.py")])
def test_a_record_depends_on_the_sources_of_its_op(stage, wanted):
    made = proof.STAGES[stage]
    own, other, all_ops = (
        {path.name for path in made.depends(op)} for op in ("memory_decode", "select_tokens", None)
    )  # fmt: skip
    assert wanted in own and wanted not in other - {"memory_decode.py"} and own | other <= all_ops


def test_make_has_the_command():
    done = subprocess.run(["make", "-n", "gpu-proof"], cwd=proof.ROOT, capture_output=True, text=True)
    assert "bench gpu-proof" in done.stdout
