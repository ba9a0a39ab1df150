"""pytest plugin of gpu-proof: a JSON line per test to the file M3_PROOF_LOG, without the tests in M3_PROOF_KEEP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def _write(record: dict) -> None:
    with open(os.environ["M3_PROOF_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def _kernel(params: dict) -> str | None:
    """The op a test is about: a parameter that is one, or its name."""
    for name in ("op", "name", "bug", "stream"):
        value = params.get(name)
        if value is not None:
            return getattr(value, "op", None) or getattr(value, "name", None) or str(value)
    return None


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items) -> None:
    keep = set(json.loads(Path(os.environ["M3_PROOF_KEEP"]).read_text()))
    _write({"collected": [item.nodeid for item in items]})
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in keep])
    items[:] = [item for item in items if item.nodeid not in keep]


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    params = item.callspec.params if hasattr(item, "callspec") else {}
    skipped = report.outcome == "skipped" and isinstance(report.longrepr, tuple)
    detail = report.longrepr[2].removeprefix("Skipped: ") if skipped else report.longreprtext[-1500:]
    _write({
        "test": item.nodeid,
        "kernel": _kernel(params),
        "arch": params.get("arch"),
        "verdict": report.outcome,
        "seconds": round(report.duration, 3),
        "figures": dict(report.user_properties),
        "detail": detail,
    })  # fmt: skip
