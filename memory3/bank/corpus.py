"""From files to references: read JSON lines, Markdown or plain text, and pack sentences into references.

A reference has at most `span` tokens. Sentences are packed greedily; a text that needs more than one reference
repeats its title in front of every one but the first ("Title: ..."), so that each can be found and read alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data import Entry
from .errors import BankError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
}
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]\u201d\u2019]*\s+(?=\S)|\n+|(?<=[\u3002\uff01\uff1f])")
_WORD = re.compile(r"\s+")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
Encode = Callable[[str], list[int]]


class CorpusError(BankError):
    """A corpus file that cannot be read; names file and line."""


@dataclass(frozen=True)
class Chunk:
    """A reference before it is written: text, its tokens, and the body's place text[start:end] in the entry."""

    title: str
    text: str
    token_ids: list[int]
    source: str
    start: int
    end: int


def read_corpus(path: str | Path) -> Iterator[Entry]:
    """Entries of a file, or of all corpus files below a folder in name order (.jsonl, .txt, .md).

    Raises CorpusError naming the file (and line).
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise CorpusError(f"{path} holds no corpus file; expected {', '.join(SUFFIXES)}")
        for file in files:
            yield from read_corpus(file)
        return
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise CorpusError(
            f"{path}: expected a file ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}"
        )
    try:
        yield from {"jsonl": _json_lines, "text": _plain, "markdown": _markdown}[kind](path)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error


def _json_lines(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(item, dict) or not isinstance(item.get("text"), str):
                raise CorpusError(f'{path}, line {number}: expected an object with a string "text"')
            title, source = item.get("title") or "", item.get("source") or path.name
            if item["text"].strip():
                yield Entry(str(title), item["text"], str(source))


def _plain(path: Path) -> Iterator[Entry]:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        yield Entry(path.stem, text, path.name)


def _markdown(path: Path) -> Iterator[Entry]:
    """One Entry per section; its title is the path of headings. Headings inside code fences are text."""
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""

    def section() -> Iterator[Entry]:
        text = "\n".join(lines).strip("\n")
        if text.strip():
            yield Entry(" - ".join(name for _, name in headings) or path.stem, text, path.name)

    for line in path.read_text(encoding="utf-8").split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark.group(1)):
            fence = "" if fence else mark.group(1)
        heading = None if fence else _HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        yield from section()
        lines.clear()
        level = len(heading.group(1))
        while headings and headings[-1][0] >= level:
            headings.pop()
        headings.append((level, heading.group(2)))
    yield from section()


def pack(entry: Entry, encode: Encode, span: int = 128) -> list[Chunk]:
    """Cut an entry into references of at most `span` tokens, in order; together they cover the whole text.

    encode gives token ids without special tokens. A sentence longer than a reference is cut between words, a word
    between characters. Raises ValueError when not even one character fits.
    """
    if span < 1:
        raise ValueError(f"span must be positive, got {span}")
    text, start = entry.text, 0
    chunks: list[Chunk] = []
    title = _short_title(entry.title, encode, span)
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        prefix = f"{title}: " if chunks and title else ""
        end, ids = _take(text, start, prefix, encode, span)
        body = text[start:end].rstrip()
        chunks.append(Chunk(entry.title, prefix + body, ids, entry.source, start, start + len(body)))
        start = end
    return chunks


def _short_title(title: str, encode: Encode, span: int) -> str:
    """The title, cut to a quarter of the span: the text is what the reference is for."""
    title = " ".join(title.split())
    while title and len(encode(f"{title}: ")) > span // 4:
        shorter = title.rsplit(" ", 1)[0] if " " in title else ""
        title = shorter
    return title


def _take(text: str, start: int, prefix: str, encode: Encode, span: int) -> tuple[int, list[int]]:
    """(end, token ids) of the longest piece from `start` that fits, cut at the best kind of boundary."""

    def tokens(end: int) -> list[int]:
        return encode(prefix + text[start:end].rstrip())

    # 24 characters a token are beyond any prose: what is further away cannot fit and need not be looked at.
    limit = min(len(text), start + 24 * span + 64)
    for boundaries in (
        _ends(_SENTENCE, text, start, limit),
        _ends(_WORD, text, start, limit),
        range(start + 1, limit + 1),
    ):
        best = _longest(list(boundaries), tokens, span)
        if best is not None:
            return best
    raise ValueError(
        f"span {span} leaves no room for a single character after the prefix {prefix!r}; use a longer span"
    )


def _ends(pattern: re.Pattern[str], text: str, start: int, limit: int) -> Iterator[int]:
    for match in pattern.finditer(text, start, limit):
        if match.end() > start:
            yield match.end()
    yield limit


def _longest(ends: list[int], tokens: Callable[[int], list[int]], span: int) -> tuple[int, list[int]] | None:
    """The last of the ascending ends whose tokens fit. Doubles, then halves: few encodings per reference."""
    best: tuple[int, list[int]] | None = None
    low, high, step = -1, len(ends), 1
    while low + step < high:
        ids = tokens(ends[low + step])
        if len(ids) <= span and ids:
            best, low = (ends[low + step], ids), low + step
            step *= 2
        else:
            high = low + step
            break
    while high - low > 1:
        middle = (low + high) // 2
        ids = tokens(ends[middle])
        if len(ids) <= span and ids:
            best, low = (ends[middle], ids), middle
        else:
            high = middle
    return best


def pack_all(entries: Iterable[Entry], encode: Encode, span: int = 128) -> Iterator[Chunk]:
    """Chunks of many entries, in order."""
    for entry in entries:
        yield from pack(entry, encode, span)
