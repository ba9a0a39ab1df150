"""Reads an LMDB data file with plain reads, without mapping it: is it whole, and what is in its pages?

LMDB maps the file; a page that is named but lies past the end of the file kills the process with SIGBUS. So a
bank is checked here first. Layout: LMDB 0.9, data version 1, 64-bit, the machine's byte order. Two meta pages
(0 and 1), then branch, leaf and overflow pages, each with a 16-byte header that starts with its own number.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import BankTruncated

MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META, LEAF2 = 0x01, 0x02, 0x04, 0x08, 0x20
META_PLACES = (0, 4096, 8192, 16384, 32768, 65536)  # the second meta page, whatever the page size
BIGDATA, SUBDATA = 0x01, 0x02
NO_PAGE = 0xFFFFFFFFFFFFFFFF
_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, lower, upper; lower and upper are the page count in OVERFLOW
_NODE = struct.Struct("<HHHH")  # data size low, high (branch: child page low, middle), flags (high), key size


class Meta(NamedTuple):
    page_size: int
    map_size: int
    last_page: int
    txn: int
    free_root: int
    main_root: int


class Damage(NamedTuple):
    """What a walk could not read: pages that are missing or are not what the tree says."""

    pages: int
    examples: list[int]


def read_meta(file: BinaryIO, path: Path) -> Meta:
    """The newest valid meta page. Raises BankTruncated when there is none."""
    size = os.fstat(file.fileno()).st_size
    head = os.pread(file.fileno(), 152, 0)
    first = _parse_meta(head)
    if first is None:
        raise BankTruncated(_broken(path, f"it has {size} bytes and does not start with an LMDB page of version 1"))
    second = _parse_meta(os.pread(file.fileno(), 152, first.page_size))
    if second is None:
        raise BankTruncated(_broken(path, f"it has {size} bytes and its second page is missing or damaged"))
    return max(first, second, key=lambda m: m.txn)


def _parse_meta(raw: bytes) -> Meta | None:
    if len(raw) < 152:
        return None
    flags = _PAGE.unpack_from(raw)[2]
    magic, version = struct.unpack_from("<II", raw, 16)
    if not flags & META or magic != MAGIC or version != DATA_VERSION:
        return None
    (map_size,) = struct.unpack_from("<Q", raw, 32)
    (page_size,) = struct.unpack_from("<I", raw, 40)
    (free_root,) = struct.unpack_from("<Q", raw, 80)
    (main_root,) = struct.unpack_from("<Q", raw, 128)
    last_page, txn = struct.unpack_from("<QQ", raw, 136)
    if page_size < 256 or page_size > 65536 or page_size & (page_size - 1):
        return None
    return Meta(page_size, map_size, last_page, txn, free_root, main_root)


def _broken(path: Path, what: str) -> str:
    return (
        f"the bank's data file {path} is damaged: {what}. Nothing was opened. Restore it from a copy, or run "
        "salvage, which copies every record that is still whole into a new bank."
    )


def check_whole(path: Path) -> Meta:
    """Raise BankTruncated unless every page that the file's trees name lies inside the file.

    LMDB may leave unused pages at the very end unwritten, so a short file is only refused when its trees reach
    past its end. A writer may commit meanwhile: a damaged walk counts only if no commit came between.
    """
    while True:
        with open(path, "rb") as file:
            meta = read_meta(file, path)
            size, want = os.fstat(file.fileno()).st_size, (meta.last_page + 1) * meta.page_size
            if size >= want:
                return meta
            lost = _Walker(file, meta.page_size).damage(meta)
            if not lost.pages:
                return meta
            if read_meta(file, path).txn == meta.txn:
                what = (
                    f"it has {size} bytes, its pages need {want}; at least {lost.pages} pages in use are lost "
                    f"(for example page {lost.examples[0]})"
                )
                raise BankTruncated(_broken(path, what))


class Entry(NamedTuple):
    """A key and value of a leaf. `root` is the root page of a named sub-database instead of a value."""

    key: bytes
    value: bytes
    root: int | None


class _Walker:
    def __init__(self, file: BinaryIO, page_size: int):
        self._fd = file.fileno()
        self.page_size = page_size
        self._pages = os.fstat(self._fd).st_size // page_size
        self.bad: list[int] = []
        self.n_bad = 0

    def _lost(self, page: int) -> None:
        self.n_bad += 1
        if len(self.bad) < 16:
            self.bad.append(page)

    def _read(self, page: int, count: int = 1) -> bytes | None:
        if page + count > self._pages:
            return None
        raw = os.pread(self._fd, count * self.page_size, page * self.page_size)
        if len(raw) < count * self.page_size or _PAGE.unpack_from(raw)[0] != page:
            return None
        return raw

    def damage(self, meta: Meta) -> Damage:
        """Walk the free list and every sub-database; values are only checked to lie inside the file."""
        for root in (meta.free_root, meta.main_root):
            for entry in self.tree(root, values=False):
                if entry.root is not None:
                    for _ in self.tree(entry.root, values=False):
                        pass
        return Damage(self.n_bad, self.bad)

    def tree(self, root: int, values: bool = True) -> Iterator[Entry]:
        """Entries below a root page, skipping (and counting) what cannot be read."""
        if root == NO_PAGE:
            return
        stack, seen = [root], set()
        while stack:
            page = stack.pop()
            raw = None if page in seen else self._read(page)
            seen.add(page)
            if raw is None:
                self._lost(page)
                continue
            flags = _PAGE.unpack_from(raw)[2]
            if flags & BRANCH:
                children = [lo | hi << 16 | up << 32 for lo, hi, up, _, _ in _nodes(raw)]
                stack.extend(reversed(children))
            elif flags & LEAF and not flags & LEAF2:
                yield from self.leaf(raw, values)
            else:
                self._lost(page)

    def leaf(self, raw: bytes, values: bool = True) -> Iterator[Entry]:
        for low, high, flags, key_size, at in _nodes(raw):
            size, start = low | high << 16, at + 8 + key_size
            key = raw[at + 8 : start]
            if flags & SUBDATA:
                if start + 48 <= len(raw):
                    yield Entry(key, b"", struct.unpack_from("<Q", raw, start + 40)[0])
            elif flags & BIGDATA:
                if start + 8 > len(raw):
                    continue
                (page,) = struct.unpack_from("<Q", raw, start)
                value = self._big(page, size, values)
                if value is None:
                    self._lost(page)
                else:
                    yield Entry(key, value, None)
            elif start + size <= len(raw):
                yield Entry(key, raw[start : start + size], None)

    def _big(self, page: int, size: int, values: bool) -> bytes | None:
        count = -(-(size + 16) // self.page_size)
        if page + count > self._pages:
            return None
        raw = self._read(page, count if values else 1)
        if raw is None or not _PAGE.unpack_from(raw)[2] & OVERFLOW:
            return None
        return raw[16 : 16 + size] if values else b""

    def find(self, root: int, key: bytes) -> tuple[bytes, int, int] | None:
        """(what the leaf holds for a key, the node's flags, the value's size), or None."""
        page = root
        for _ in range(64):  # deeper than any tree; a damaged one may go in circles
            raw = self._read(page) if page != NO_PAGE else None
            if raw is None:
                return None
            _, _, flags, lower, _ = _PAGE.unpack_from(raw)
            branch, count = bool(flags & BRANCH), max(0, min(lower, len(raw)) - 16) // 2
            first, last = (1 if branch else 0), count  # a branch's first key stands for everything below the second
            while first < last:  # the first node with a larger key
                middle = (first + last) // 2
                (at,) = struct.unpack_from("<H", raw, 16 + 2 * middle)
                (key_size,) = struct.unpack_from("<H", raw, at + 6)
                if raw[at + 8 : at + 8 + key_size] <= key:
                    first = middle + 1
                else:
                    last = middle
            if first == 0:
                return None
            (at,) = struct.unpack_from("<H", raw, 16 + 2 * (first - 1))
            low, high, node_flags, key_size = _NODE.unpack_from(raw, at)
            if branch:
                page = low | high << 16 | node_flags << 32
                continue
            start, size = at + 8 + key_size, low | high << 16
            if raw[at + 8 : start] != key:
                return None
            return raw[start : start + (8 if node_flags & BIGDATA else size)], node_flags, size
        return None

    def every_leaf(self) -> Iterator[Entry]:
        """Entries of every page that looks like a leaf, in the file's order, whether a tree reaches it or not."""
        for page in range(2, self._pages):
            raw = self._read(page)
            if raw is not None and _PAGE.unpack_from(raw)[2] & ~0x10 == LEAF:
                yield from self.leaf(raw)


def places(file: BinaryIO, path: Path, database: str, keys: Sequence[bytes]) -> list[tuple[int, int]]:
    """(offset, bytes) in the file of the values of `keys` that have pages of their own, by the newest commit.

    Keys that are not there, and small values inside leaf pages, are left out. Raises BankTruncated without a meta page.
    """
    meta = read_meta(file, path)
    walker = _Walker(file, meta.page_size)
    named = walker.find(meta.main_root, database.encode("ascii"))
    if named is None or not named[1] & SUBDATA:
        return []
    (root,) = struct.unpack_from("<Q", named[0], 40)
    found = []
    for key in keys:
        hit = walker.find(root, key)
        if hit is not None and hit[1] & BIGDATA:
            (page,) = struct.unpack_from("<Q", hit[0])
            found.append((page * meta.page_size, hit[2] + 16))
    return found


def _nodes(raw: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    lower = _PAGE.unpack_from(raw)[3]
    for i in range(max(0, min(lower, len(raw)) - 16) // 2):
        (at,) = struct.unpack_from("<H", raw, 16 + 2 * i)
        if 16 <= at and at + 8 <= len(raw):
            low, high, flags, key_size = _NODE.unpack_from(raw, at)
            if at + 8 + key_size <= len(raw):
                yield low, high, flags, key_size, at


def salvage_entries(path: Path) -> tuple[Iterator[tuple[str | None, bytes, bytes]], bool]:
    """(database, key, value) of all that can be read, reachable values first; then whether trees were damaged.

    Where the newest trees have lost pages, every leaf page of the file is read as well (database None): that may
    bring back values that were deleted but not yet overwritten. The caller checks every value.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        metas = [m for m in (_meta_at(file, at) for at in META_PLACES) if m is not None]
        meta = max(metas, key=lambda m: m.txn, default=None)
        damaged = meta is None or size < (meta.last_page + 1) * meta.page_size
        if meta is not None:
            damaged = _Walker(file, meta.page_size).damage(meta).pages > 0

    def entries() -> Iterator[tuple[str | None, bytes, bytes]]:
        with open(path, "rb") as file:
            walker = _Walker(file, meta.page_size if meta else 4096)
            if meta is not None:
                for main in walker.tree(meta.main_root):
                    if main.root is not None:
                        name = main.key.decode("ascii", "replace")
                        for entry in walker.tree(main.root):
                            if entry.root is None:
                                yield name, entry.key, entry.value
            if damaged:
                for entry in walker.every_leaf():
                    if entry.root is None:
                        yield None, entry.key, entry.value

    return entries(), damaged


def _meta_at(file: BinaryIO, offset: int) -> Meta | None:
    return _parse_meta(os.pread(file.fileno(), 152, offset))
