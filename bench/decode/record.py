"""Runs in a JSON file that a later call goes on with: a slice of minutes today, the rest tomorrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report import SCHEMA, document, write_json
from .arms import Setting


class Record:
    """All runs of all settings, one entry per (setting, arm, round), and what is known once per weights.

    path None: kept in memory only. Raises ValueError for a file of another suite or schema.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings, self.environment = dict(settings), dict(environment)
        self.runs: list[dict[str, Any]] = []
        self.about: dict[str, dict] = {}  # weights -> bytes, ceilings, seconds of writing
        self.peak: dict[str, dict[str, int]] = {}  # setting -> arm -> peak resident bytes
        if self.path is not None and self.path.is_file():
            read = json.loads(self.path.read_text(encoding="utf-8"))
            if (read.get("suite"), read.get("schema")) != ("decode", SCHEMA):
                raise ValueError(f"{path}: expected results of bench decode, schema {SCHEMA}; choose another file")
            self.runs, self.about, self.peak = read["runs"], read["about"], read["peak"]
            self.settings = read["settings"] | self.settings

    def of(self, setting: Setting) -> dict[str, list[dict]]:
        """Complete rounds: arm -> runs, all lists in the same order of rounds."""
        mine = [r for r in self.runs if r["setting"] == setting.key]
        names = list(dict.fromkeys(r["arm"] for r in mine))
        rounds = self._rounds(mine, names)
        return {name: [r for r in mine if r["arm"] == name and r["round"] in rounds] for name in names}

    @staticmethod
    def _rounds(runs: list[dict], names) -> set[int]:
        seen: dict[int, set[str]] = {}
        for r in runs:
            seen.setdefault(r["round"], set()).add(r["arm"])
        return {number for number, arms in seen.items() if set(names) <= arms}

    def missing(self, setting: Setting, names, rounds: int) -> list[int]:
        """Rounds that some of these arms have not run."""
        done = self._rounds([r for r in self.runs if r["setting"] == setting.key], names)
        return [number for number in range(rounds) if number not in done]

    def add(self, setting: Setting, number: int, found: Mapping[str, dict]) -> None:
        """A whole round: it replaces what there is of it, since arms are only compared within one."""
        self.runs = [r for r in self.runs if (r["setting"], r["round"]) != (setting.key, number)]
        for arm, run in found.items():
            self.runs.append({"setting": setting.key, **asdict(setting), "arm": arm, "round": number, **_short(run)})

    def save(self, rows: Callable[[Record], list[dict]]) -> None:
        if self.path is not None:
            more = {"about": self.about, "peak": self.peak, "runs": self.runs}
            write_json(self.path, document("decode", self.settings, self.environment, rows(self), **more))

    def known(self) -> list[Setting]:
        """Settings with runs, in the order of their first."""
        fields = Setting.__dataclass_fields__
        return list(dict.fromkeys(Setting(**{name: r[name] for name in fields}) for r in self.runs))


def _short(run: Mapping[str, Any]) -> dict[str, Any]:
    """Microseconds are enough."""
    kept: dict[str, Any] = {}
    for name, value in run.items():
        if isinstance(value, Mapping):
            kept[name] = _short(value)
        else:
            kept[name] = round(value, 6) if isinstance(value, float) else value
    return kept
