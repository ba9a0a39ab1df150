"""Files that are complete or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)
