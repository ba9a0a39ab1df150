"""bench compare: what counts as a loss, on made-up sides with known noise; the workers, the export and the command."""

import json
import math
import os
import random
import signal

import pytest

from bench import __main__ as command
from bench import compare
from bench.compare import gate, selftest, sides
from bench.compare.gate import Change, Limits, Look
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


def changes(count: int, slower: float, **shape) -> list[Change]:
    fresh = made_sides(random.Random(7), slower, **shape)
    return [gate.compare(["c"], fresh, Limits())[0] for _ in range(count)]


def losses(count: int, slower: float, **shape) -> int:
    return sum(change.loss for change in changes(count, slower, **shape))


@pytest.mark.parametrize(("noise", "process"), [(0.01, 0.01), (0.03, 0.02), (0.06, 0.02), (0.01, 0.04)])
def test_equal_sides_are_hardly_ever_a_loss(noise, process):
    """Unlucky placement lasts as long as a process; the next look has others."""
    assert losses(2000, 1.0, noise=noise, process=process) <= 4


def test_ten_percent_are_found():
    assert losses(400, 1.10, noise=0.03, process=0.02) >= 385
    assert losses(200, 1.30, noise=0.10, process=0.04) >= 190, "a large loss is found on a noisy machine too"


def test_small_changes_do_not_count():
    assert losses(200, 1.03, noise=0.01, process=0.002) == 0, "below the relative threshold"
    assert losses(200, 1.30, noise=0.01, seconds=0.5e-6) == 0, "below the absolute one"


def test_as_many_looks_as_it_takes():
    quiet, noisy = (changes(200, 1.1, noise=0.01, process=process) for process in (0.003, 0.04))
    assert [change.looks for change in quiet].count(6) >= 198, "the short ones and five more"
    seen = [change.looks for change in noisy]
    assert 6.5 < sum(seen) / len(seen) < 12 and max(seen) <= 21
    unclear = changes(100, 1.05, noise=0.01, process=0.002)
    assert max(change.looks for change in unclear if not change.loss) == 21, "used up, and not a loss"


def test_only_what_looks_slower_is_measured_again():
    rng = random.Random(3)
    slower, faster, started = made_sides(rng, 1.2, noise=0.01), made_sides(rng, 0.8, noise=0.01), []

    class Both:
        def __init__(self, name):
            self.made = {"slow": slower()[name], "fast": faster()[name]}

        def seconds(self, case):
            return self.made[case].seconds(case)

    def fresh():
        started.append({name: Both(name) for name in ("base", "again", "head")})
        return started[-1]

    fast, slow = gate.compare(["fast", "slow"], fresh, Limits(rounds=6))
    assert slow.loss and slow.looks == 6 and len(started) == 8 and 1.15 < slow.ratio < 1.25
    assert slow.low < slow.ratio < slow.high and slow.noise < 0.05
    assert fast.faster and not fast.loss and fast.looks == 1
    asked = [[side["head"].made[case].asked for side in started] for case in ("slow", "fast")]
    assert asked == [[3] * 3 + [7] * 5, [3] * 3 + [0] * 5], "two or six rounds and one that is not counted"


def test_every_side_is_measured_alike():
    made = made_sides(random.Random(1))()
    gate.look("c", made, 6)
    assert {side.asked for side in made.values()} == {7}, "six rounds and one that is not counted"


def looks(changes, noise=0.0):
    return [Look(1e-3, 1e-3 * math.exp(change), (change,), noise) for change in changes]


def test_standard_error():
    """By hand: what looks differ by, and base's own noise, which counts as much without it."""
    median, error = gate.median_change(looks([0.08, 0.10, 0.12, 0.5]))
    process = 1.4826 * 0.01 / 1.5**0.5 / 2 * 1.25  # of 0, 0, 0, 0, .01, .01, .03, .39 from the median, 0.11
    assert median == pytest.approx(0.11) and error == pytest.approx(1.2533 * (1.5 / 4) ** 0.5 * process)
    process = 1.4826 * (0.04 / 2**0.5) / 2 * 1.2  # of five times 0 and five times 0.04
    assert gate.median_change(looks([0.1] * 5, 0.04))[1] == pytest.approx(1.2533 * 0.3**0.5 * process)
    assert gate.median_change(looks([0.1] * 5))[1] == pytest.approx(1.2533 * 0.3**0.5 * 0.005), "luck does not help"


def test_decision():
    def of(*changes, noise=0.0):
        return gate.is_loss(looks(changes, noise), Limits())

    assert of(0.1) is None and of(*[0.1] * 4) is None and of(*[0.1] * 5) is True
    assert of(0.0) is None and of(0.0, 0.0) is False, "clear after two"
    assert of(*[0.1] * 4, 0.9) is True and of(*[0.1] * 4, -0.5) is True, "one unlucky process"
    assert of(*[0.1] * 5, noise=0.08) is None, "not beyond what base differs from itself by"
    assert of(*[0.048] * 19) is None and of(*[0.048] * 20) is False
    assert of(*[0.1] * 20, noise=0.3) is False, "never sure"


def test_markdown():
    def change(case, ratio, **more):
        fields = {"faster": False} | more
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
    assert compare.chosen(["b/1/x", "a/2/x", "a/1/x"], args) == ["a/1/x", "b/1/x"]
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


@pytest.fixture
def tree(tmp_path):
    """One that has a single op, with cases that do as they are called, and notes every import and every making."""
    package = tmp_path / "memory3_kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"open({str(tmp_path / 'imports')!r}, 'a').write('i')\ndef native_reason(): return None\n"
    )
    (package / "_registry.py").write_text(f"""
import os, torch
from types import SimpleNamespace

class Op:
    name, dtypes = "op", (torch.float32,)

    def cases(self):
        def make(dtype, generator):
            open({str(tmp_path / "made")!r}, "a").write("m")
            return (torch.rand(4, generator=generator),), {{"what": None}}
        for name in ("well", "raise", "exit"):
            made = lambda *given, name=name: (make(*given)[0], {{"what": name}})
            yield SimpleNamespace(id=name, bench=True, make=made)

    def __call__(self, x, what):
        if what == "raise":
            raise ValueError("no")
        if what == "exit":
            os._exit(7)

OPS = {{"op": Op()}}
""")
    return tmp_path


def test_a_fresh_process_keeps_the_import(tree):
    with sides.WorkerSide(tree) as side:
        seen = [side.pid]
        for _ in range(3):
            assert side.seconds("op/well/float32") < 1e-3
            side.fresh()
            seen.append(side.pid)
        side.fresh()
        side.fresh()
        seen.append(side.pid)
        assert side.seconds("op/well/float32") < 1e-3
    assert len(set(seen)) == 5 and (tree / "imports").read_text() == "i"
    assert side._process.returncode == 0, "ended by the end of its input"
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_start_once(tree):
    with sides.Workers(tree, tree) as workers:
        first = {name: side.pid for name, side in workers.fresh().items()}
        second = {name: side.pid for name, side in workers.fresh().items()}
    assert list(first) == ["base", "again", "head"]
    assert len({*first.values(), *second.values()}) == 6 and (tree / "imports").read_text() == "iii"


def test_kept_operands_are_made_once(tree, tmp_path_factory):
    for kept, made in ((None, "mm"), (tmp_path_factory.mktemp("kept"), "mmm")):
        with sides.WorkerSide(tree, kept=kept) as side:
            side.seconds("op/well/float32")
            side.fresh()
            side.seconds("op/well/float32")
        assert (tree / "made").read_text() == made


def test_a_crash_is_reported(tree, capfd):
    for case, status in (("raise", 1), ("exit", 7)):
        with sides.WorkerSide(tree) as side, pytest.raises(RuntimeError, match=f"ended with status {status}$"):
            side.seconds(f"op/{case}/float32")
    assert "ValueError: no" in capfd.readouterr().err
    with sides.WorkerSide(tree) as side:
        side.fresh()
        os.kill(side.pid, signal.SIGKILL)
        side._process.wait()
        with pytest.raises(RuntimeError, match="ended with status 137$"):
            side.seconds("op/well/float32")


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
    with pytest.raises(SystemExit, match="same settings"):
        command.main([*line, "2", "--rounds", "4"])
