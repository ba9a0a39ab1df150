"""Every planted bug (tests/simt/bugs) is found by the stage that its patch names; the sources as they are, by none.

By default one bug of each stage; M3_PROOF=full: all.
"""

from __future__ import annotations

import os

import pytest
from simt import planted

FULL = os.environ.get("M3_PROOF") == "full"
ALL = planted.bugs()
FEW = ("missing-barrier", "missing-query-guard", "unwritten-part")


@pytest.fixture(scope="module")
def sources():
    return planted.Sources()


def chosen() -> list[planted.Bug]:
    return ALL if FULL else [bug for bug in ALL if bug.name in FEW]


def test_there_are_enough_bugs_for_every_stage():
    assert len(ALL) >= 10 and {bug.stage for bug in ALL} == set(planted.STAGES)
    assert {bug.stage for bug in chosen()} >= {"schedule", "sanitizers", "ptx"}


@pytest.mark.parametrize("bug", ALL, ids=lambda bug: bug.name)
def test_patches_fit(bug, sources):
    if planted.missing("simt"):
        pytest.skip(planted.missing("simt"))
    try:
        sources.plant(bug)
    finally:
        sources.restore(bug)


@pytest.mark.slow
@pytest.mark.parametrize("bug", chosen(), ids=lambda bug: bug.name)
def test_bug_is_found(bug, sources, record_property):
    if planted.missing(bug.stage):
        pytest.skip(planted.missing(bug.stage))
    record_property("said", planted.catch(bug, sources))


@pytest.mark.slow
@pytest.mark.parametrize("stage, op", sorted({(bug.stage, bug.op) for bug in chosen()}))
def test_nothing_is_found_without_a_bug(stage, op, sources):
    if planted.missing(stage):
        pytest.skip(planted.missing(stage))
    found, said = planted.run_stage(stage, op, sources.csrc, sources.folder)
    assert not found, said[-4000:]
