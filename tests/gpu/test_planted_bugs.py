"""Every planted bug (tests/simt/bugs) is found by the stage that its patch names; the sources as they are, by none.

By default one bug of each stage but simt (schedule in plain order); M3_PROOF=full: all.
"""

from __future__ import annotations

import os

import pytest
from simt import host, planted

FULL = os.environ.get("M3_PROOF") == "full"
ALL = planted.bugs()
FEW = ("vq-missing-set-up-barrier", "gather-missing-row-guard", "select-missing-sync-warp", "gather-strides-by-index")


@pytest.fixture(scope="module")
def sources():
    return planted.Sources()


def chosen() -> list[planted.Bug]:
    return ALL if FULL else [bug for bug in ALL if bug.name in FEW]


def controls() -> dict[tuple[str, str], tuple[str, ...]]:
    """The sample calls that the chosen bugs of a stage and op are found by; none: all."""
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for bug in chosen():
        found.setdefault((bug.stage, bug.op), []).append(bug.cases)
    return {
        at: () if () in cases else tuple(dict.fromkeys(name for names in cases for name in names))
        for at, cases in sorted(found.items())
    }


def test_there_are_bugs_of_every_stage_and_kernel():
    assert {bug.stage for bug in ALL} == set(planted.STAGES)
    assert {bug.stage for bug in chosen()} >= set(planted.STAGES) - {"simt"}
    for op in host.names():
        assert sum(bug.op == op for bug in ALL) >= 2, op


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
@pytest.mark.parametrize("stage, op", controls())
def test_nothing_is_found_without_a_bug(stage, op, sources):
    if planted.missing(stage):
        pytest.skip(planted.missing(stage))
    found, said = planted.run_stage(stage, op, sources, controls()[stage, op])
    assert not found, said[-4000:]
