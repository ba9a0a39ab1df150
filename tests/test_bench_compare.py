"""bench compare: what counts as a loss, on made-up sides with known noise; the workers, the export and the command."""

import json
import random

import pytest

from bench import __main__ as command
from bench import compare
from bench.compare import gate, selftest, sides
from bench.compare.gate import Change, Limits
from memory3_kernels import _load

needs_native = pytest.mark.skipif(not _load.available_simd_levels(), reason="M3_NATIVE=0")
CASE = "merge_attention_states/T256_H40_D80/bfloat16"


class Made:
    """A side whose calls take `seconds`, times noise of this process and of each measurement, on a drifting machine."""

    def __init__(self, rng: random.Random, seconds: float = 1e-3, noise: float = 0.03, process: float = 0.01):
        self.rng, self.noise = rng, noise
        self.level = seconds * rng.lognormvariate(0, process)
        self.asked = 0

    def seconds(self, case: str) -> float:
        self.asked += 1
        preempted = 1.5 if self.rng.random() < 0.05 else 1.0
        return self.level * self.rng.lognormvariate(0, self.noise) * preempted


def made_sides(rng, slower=1.0, **shape):
    seconds = shape.pop("seconds", 1e-3)
    return lambda: {
        "base": Made(rng, seconds, **shape), "again": Made(rng, seconds, **shape),
        "head": Made(rng, seconds * slower, **shape),
    }  # fmt: skip


def losses(count: int, slower: float, **shape) -> int:
    rng = random.Random(7)
    fresh = made_sides(rng, slower, **shape)
    return sum(gate.compare(["c"], fresh(), fresh, Limits())[0].loss for _ in range(count))


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06])
def test_equal_sides_are_hardly_ever_a_loss(noise):
    assert losses(400, 1.0, noise=noise) <= 2


def test_ten_percent_are_found():
    assert losses(200, 1.10, noise=0.02) >= 190
    assert losses(200, 1.30, noise=0.10) >= 190, "a large loss is found on a noisy machine too"


def test_small_changes_do_not_count():
    assert losses(200, 1.03, noise=0.01, process=0.002) == 0, "below the relative threshold"
    assert losses(200, 1.30, noise=0.01, seconds=0.5e-6) == 0, "below the absolute one"


def test_processes_that_differ_are_not_mistaken_for_a_change():
    """An unlucky placement of one process lasts as long as the process; the next look has another one."""
    assert losses(300, 1.0, noise=0.005, process=0.04) <= 3


def test_only_what_looks_slower_is_measured_again():
    rng, started = random.Random(3), []

    def fresh():
        started.append(1)
        return made_sides(rng, 1.2, noise=0.01)()

    first = made_sides(rng, 1.0, noise=0.01)()
    first["head"] = Made(rng, 1.2e-3, noise=0.01)
    (change,) = gate.compare(["c"], first, fresh, Limits(rounds=5))
    assert change.loss and change.looks == 4 and len(started) == 3 and 1.15 < change.ratio < 1.25
    started.clear()
    (change,) = gate.compare(["c"], made_sides(rng, 0.8, noise=0.01)(), fresh, Limits())
    assert change.faster and not change.loss and change.looks == 1 and not started


def test_every_side_is_measured_alike():
    made = made_sides(random.Random(1))()
    gate.look("c", made, Limits(), 6)
    assert {side.asked for side in made.values()} == {7}, "six rounds and one that is not counted"


def test_markdown():
    def change(case, ratio, **more):
        fields = {"suspect": False, "slower": False, "faster": False} | more
        return Change(case, 1e-4, ratio * 1e-4, ratio, ratio - 0.01, ratio + 0.01, 0.01, **fields)

    fine = gate.markdown([change("a", 1.0), change("b", 0.9, faster=True)], "main", "x", ["c"])
    assert "**No confident loss** in 2 cases (x against main)" in fine and "| b | 100.0 us | 90.0 us | -10.0% |" in fine
    assert "one side lacks them: c" in fine
    bad = gate.markdown([change("a", 1.0), change("b", 1.2, loss=True)], "main", "x")
    rows = [line for line in bad.splitlines() if line.startswith("| ")]
    assert "**1 of 2 cases slower**" in bad and rows[1].startswith("| b |") and rows[1].endswith("| **slower** |")


def test_summary_of_the_self_test():
    found = {
        "self": [{"losses": []}] * 99 + [{"losses": ["a", "b"]}],
        "planted": [{"losses": ["a", "b"]}, {"losses": ["a"]}],
    }  # fmt: skip
    seen = selftest.summary(found, ["a", "b"])
    assert (seen["false_alarms"], seen["false_alarm_rate"]) == (1, 0.01), "two cases of one comparison are one alarm"
    assert (seen["planted"], seen["detected"], seen["detection_rate"]) == (4, 3, 0.75)
    assert selftest.summary({"self": [], "planted": []}, ["a"])["detection_rate"] is None


def test_chosen_cases():
    args = command.parser().parse_args(["compare", "--suite", "smoke"])
    assert compare.chosen(["a/1/x", "a/2/x", "b/1/x"], args) == ["a/1/x", "b/1/x"]
    args = command.parser().parse_args(["compare", "--case", "2/x", "b/"])
    assert compare.chosen(["a/1/x", "a/2/x", "b/1/x"], args) == ["a/2/x", "b/1/x"]
    with pytest.raises(SystemExit, match="--case"):
        compare.chosen(["c"], args)


def test_export_and_build_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="could not read 'no-such-ref'"):
        sides.export("no-such-ref", tmp_path / "bad")
    (tmp_path / "tree" / "_build").mkdir(parents=True)
    (tmp_path / "tree" / "_build" / "native.py").write_text("print('line of the compiler'); raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="tree does not build:\nline of the compiler"):
        sides.build(tmp_path / "tree")


def test_export_is_the_commits_files(tmp_path):
    from subprocess import check_output, run

    run(["git", "init", "-q", tmp_path / "r"], check=True)
    (tmp_path / "r" / "a.txt").write_text("one")
    git = ["git", "-C", str(tmp_path / "r"), "-c", "user.name=a", "-c", "user.email=a@b"]
    run([*git, "add", "."], check=True)
    run([*git, "commit", "-qm", "x"], check=True)
    (tmp_path / "r" / "a.txt").write_text("two")
    tree = sides.export("HEAD", tmp_path / "out", tmp_path / "r")
    assert (tree / "a.txt").read_text() == "one" and not (tree / ".git").exists()
    assert check_output([*git, "worktree", "list"], text=True).count("\n") == 1


@needs_native
def test_a_planted_slowdown_slows_a_worker():
    with sides.WorkerSide(sides.ROOT) as plain, sides.WorkerSide(sides.ROOT, slower=3.0) as slow:
        assert CASE in plain.cases
        assert slow.seconds(CASE) > 2.0 * plain.seconds(CASE)
        with pytest.raises(ValueError, match="got 'nothing'"):
            plain.seconds("nothing")


def test_a_worker_refuses_another_tree(tmp_path):
    with sides.WorkerSide(tmp_path) as side, pytest.raises(RuntimeError, match="ended with status 1"):
        side.seconds(CASE)


@needs_native
@pytest.mark.parametrize(("slower", "status"), [(1.0, 0), (2.0, 1)])
def test_command(tmp_path, monkeypatch, capsys, slower, status):
    """The exit status is that of the comparison; both sides are this tree, the second one slowed."""
    made = sides.Workers
    monkeypatch.setattr(sides, "export", lambda ref, folder: sides.ROOT)
    monkeypatch.setattr(sides, "build", lambda tree: None)
    monkeypatch.setattr(sides, "Workers", lambda *trees, threads: made(*trees, threads, slower))
    out, table = tmp_path / "c.json", tmp_path / "c.md"
    line = ["compare", "main", "topic", "--case", CASE, "--rounds", "5", "--relative", "0.3", "--json", str(out),
            "--markdown", str(table)]  # fmt: skip
    assert command.main(line) == status
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == CASE and row["loss"] == bool(status)
    assert table.read_text() in capsys.readouterr().out and "topic against main" in table.read_text()


@needs_native
def test_self_test_goes_on(tmp_path, capsys):
    path = tmp_path / "s.json"
    line = ["compare", "--self-test", "--case", CASE, "--rounds", "3", "--relative", "0.5", "--json", str(path),
            "--planted", "0", "--comparisons"]  # fmt: skip
    command.main([*line, "1"])
    command.main([*line, "2"])
    read = json.loads(path.read_text())
    assert read["rows"][0]["comparisons"] == 2 == len(read["comparisons"]["self"])
    assert "in 2 comparisons of 1 cases" in capsys.readouterr().out
