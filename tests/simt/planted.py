"""Planted bugs: patches in bugs/, each with the stage that must find it. Proofs that never fail prove nothing.

A patch begins with its headers:
    Bug: one line about it
    Op: whose kernels have it
    Stage: simt (in plain order), schedule (in another order), sanitizers, ptx (the PTX interpreter, on nvcc's code), or
        resources (what nvcc's binary for sm_80 needs and is made of)
    Cases: names of the sample calls (tests/simt/cases.py) that can show it; left out: all are tried
    Says: a regular expression that what is found must match

    PYTHONPATH=tests python -m simt.planted [BUG ...]      plants them (default: all) and tells who found what
    PYTHONPATH=tests python -m simt.planted --clean STAGE OP [CASE ...]   the stage on the sources as they are
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import build

BUGS = Path(__file__).parent / "bugs"
OUT = build.ROOT / "build" / "simt" / "planted"
STAGES = ("simt", "schedule", "sanitizers", "ptx", "resources")
FOUND = 3  # exit code of a stage that found something
SEEDS = 3  # random orders of the schedule stage


@dataclass(frozen=True)
class Bug:
    name: str
    about: str
    op: str
    stage: str
    cases: tuple[str, ...]
    says: str
    patch: Path


def bugs() -> list[Bug]:
    """All planted bugs.

    Raises:
        ValueError: a patch whose headers are not as above.
    """
    found = []
    for path in sorted(BUGS.glob("*.patch")):
        head = path.read_text().partition("\n---")[0]
        fields = dict(re.findall(r"^(Bug|Op|Stage|Cases|Says): (.+)$", head, re.MULTILINE))
        cases = tuple(fields.pop("Cases", "").split())
        if set(fields) != {"Bug", "Op", "Stage", "Says"} or fields["Stage"] not in STAGES:
            raise ValueError(f"{path.name}: expected the headers Bug, Op, Stage ({', '.join(STAGES)}) and Says")
        found.append(Bug(path.stem, fields["Bug"], fields["Op"], fields["Stage"], cases, fields["Says"], path))
    return found


class Sources:
    """A copy of csrc that patches go into and out of; objects are kept, so that each costs what it touches. One at a
    time: another process waits for the folder."""

    def __init__(self, folder: Path = OUT):
        self.csrc = folder / "csrc"
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        for path in build.CSRC.rglob("*"):
            if path.is_file():
                self._write(path.relative_to(build.CSRC), path.read_bytes())

    def _write(self, relative: Path, text: bytes) -> None:
        """Only what differs: an untouched file keeps its time, a restored one gets a new one."""
        target = self.csrc / relative
        if not target.is_file() or target.read_bytes() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)

    def plant(self, bug: Bug) -> None:
        """Raises RuntimeError where the patch no longer fits: a changed kernel needs its bugs planted anew."""
        command = ["patch", "-p1", "--no-backup-if-mismatch", "-d", str(self.folder), "-i", str(bug.patch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{bug.patch.name} does not fit the sources any more:\n{done.stdout}{done.stderr}")

    def restore(self, bug: Bug) -> None:
        for name in re.findall(r"^\+\+\+ b/csrc/(\S+)", bug.patch.read_text(), re.MULTILINE):
            self._write(Path(name), (build.CSRC / name).read_bytes())
        for left in self.csrc.rglob("*.rej"):
            left.unlink()


def run_stage(stage: str, op: str, sources: Sources, cases: tuple[str, ...] = ()) -> tuple[bool, str]:
    """(found something, what it said) of a stage for an op's kernels, on some of its sample calls (default: all).

    Raises:
        RuntimeError: the sources do not compile, or the stage itself broke.
    """
    sanitize, folder = stage == "sanitizers", sources.folder
    # The interpreter takes nvcc's code, planted; the host then launches it with the launchers as they are.
    csrc, kind = (build.CSRC, "launchers") if stage == "ptx" else (sources.csrc, "sanitized" if sanitize else "plain")
    library = "" if stage == "resources" else build.build(sanitize, csrc, folder / kind / op, (op,), one_shape=True)
    environment = (build.environment() if sanitize else dict(os.environ)) | {
        "PYTHONPATH": os.pathsep.join((str(build.HERE.parent), str(build.HERE.parent / "gpu"))),
        "OMP_NUM_THREADS": "1",
        "M3_PROOF": "",  # one shape, here too
    }
    command = [sys.executable, "-m", "simt.planted_stage", stage, op, str(library), str(sources.csrc),
               str(folder / "nvcc"), *cases]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=build.ROOT, errors="replace")
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return False, said
    # A crash is a finding too: a sanitizer ends the process with 99, a wild address with a signal.
    if done.returncode < 0:
        return True, f"{said}ended by signal {-done.returncode}\n"
    if done.returncode in (FOUND, 99):
        return True, said
    raise RuntimeError(f"stage {stage} of {op} ended with status {done.returncode}:\n{said[-4000:]}")


def catch(bug: Bug, sources: Sources) -> str:
    """What the bug's stage says of it.

    Raises:
        AssertionError: the stage did not find it, or for another reason than the bug's.
    """
    try:
        sources.plant(bug)
        found, said = run_stage(bug.stage, bug.op, sources, bug.cases)
    finally:
        sources.restore(bug)
    if not found:
        raise AssertionError(f"{bug.name} ({bug.about}): stage {bug.stage} found nothing")
    if not re.search(bug.says, said):
        raise AssertionError(f"{bug.name}: expected stage {bug.stage} to say {bug.says!r}, it said:\n{said[-3000:]}")
    return next(line for line in said.splitlines() if re.search(bug.says, line)).strip()


def missing(stage: str) -> str | None:
    """Why a stage cannot run here, or None."""
    if shutil.which("patch") is None:
        return "the program patch is not installed"
    if stage == "ptx":
        from . import ptx

        return ptx.missing()
    if stage == "resources":
        from . import nvcc

        return nvcc.missing_tools()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="take STAGE, OP and CASES, plant nothing")
    parser.add_argument("names", nargs="*", metavar="BUG")
    options = parser.parse_args()
    sources = Sources()
    if options.clean:
        stage, op, *cases = options.names
        if reason := missing(stage):
            parser.error(reason)
        found, said = run_stage(stage, op, sources, tuple(cases))
        print(said if found else "nothing found")
        return int(found)
    wrong = 0
    for bug in bugs():
        if options.names and bug.name not in options.names:
            continue
        try:
            print(f"{bug.name:28s} {bug.stage:10s} {catch(bug, sources)[:150]}", flush=True)
        except (AssertionError, RuntimeError) as error:
            wrong += 1
            print(f"{bug.name:28s} {bug.stage:10s} NOT CAUGHT: {error}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
