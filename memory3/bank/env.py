"""One LMDB environment per bank folder and process: opening, locks, map growth, transactions.

LMDB allows a file to be open only once per process, and its map may only be replaced while no transaction is
running. So all Bank objects of a process share one Environment per file, and every transaction passes a gate.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from .errors import BankError, BankFull, BankNotFound
from .lmdbfile import check_whole
from .locks import Gate, open_lock

DATABASES = ("header", "state", "records", "embeddings", "references", "log")
DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"
MAX_READERS = 1024
MIN_MAP = 1 << 20
GROW_STEP = 16 << 30  # above this size the map grows by this much instead of doubling
_FULL = {errno.ENOSPC: "the disk is full", errno.EFBIG: "a file size limit (ulimit -f) is reached",
         errno.EDQUOT: "the disk quota is used up"}  # fmt: skip
T = TypeVar("T")


class Environment:
    """Shared by all Bank objects of this process on one folder. Use `acquire` and `release`."""

    _open: dict[str, Environment] = {}
    _open_guard = threading.Lock()

    def __init__(self, folder: Path, write: bool, map_bytes: int):
        self.folder = folder
        self.data_path = folder / DATA_FILE
        self._gate = Gate()
        self._write_guard = threading.RLock()
        self._users = 0
        self._pid = os.getpid()
        self._writable = write
        self.max_bytes: int | None = None
        self._start(map_bytes)

    @classmethod
    def acquire(cls, folder: Path, write: bool, map_bytes: int = 0) -> Environment:
        """The process's environment of this folder; opened, or reopened for writing, as needed."""
        folder = Path(os.path.realpath(folder))
        with cls._open_guard:
            env = cls._open.get(str(folder))
            if env is not None and env._pid == os.getpid():
                if env._swapped():
                    env._reopen()
                if write and not env._writable:
                    env._reopen(write=True)
            else:
                env = cls._open[str(folder)] = cls(folder, write, map_bytes)
            env._users += 1
            return env

    def release(self) -> None:
        """One user less; the last one closes the file."""
        with Environment._open_guard:
            self._users -= 1
            if self._users == 0:
                if self._pid == os.getpid():
                    with self._gate.alone():
                        self._env.close()
                if Environment._open.get(str(self.folder)) is self:
                    del Environment._open[str(self.folder)]

    def _start(self, map_bytes: int) -> None:
        with open_lock(self.folder):
            if not self.data_path.is_file():
                raise BankNotFound(f"no bank at {self.folder} ({DATA_FILE} is missing); Bank.create makes one")
            meta = check_whole(self.data_path)
            self._inode = self.data_path.stat().st_ino
            size = max(map_bytes, meta.map_size, (meta.last_page + 1) * meta.page_size, MIN_MAP)
            self._env = open_lmdb(self.folder, size, readonly=not self._writable)
        try:
            self._dbs = {name: self._env.open_db(name.encode(), create=False) for name in DATABASES}
            with self._env.begin() as txn:
                epoch = txn.get(b"epoch", db=self._dbs["state"])
        except lmdb.NotFoundError:
            self._env.close()
            raise BankNotFound(f"{self.data_path} is an LMDB file but not a memory3 bank") from None
        if epoch is None:
            self._env.close()
            raise BankNotFound(f"{self.data_path} is an LMDB file but not a memory3 bank (it has no epoch)")
        self.epoch = epoch  # random, made with the bank: tells it from another one that took its place
        if self._writable:
            self._env.reader_check()  # forget readers that died, they would keep old pages from being reused

    def _reopen(self, write: bool | None = None) -> None:
        with self._gate.alone():
            self._env.close()
            self._writable = self._writable if write is None else write
            self._start(0)

    def db(self, name: str) -> Any:
        return self._dbs[name]

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A read transaction with zero-copy values, valid only inside the block. Do not write inside."""
        if self._pid != os.getpid():
            raise BankError(
                f"the bank {self.folder} was opened in process {self._pid} and is used in {os.getpid()}; LMDB does "
                "not survive fork: open the bank again in the new process"
            )
        self._follow_swap()
        with self._gate.shared():
            txn = None
            try:
                txn = self._env.begin(buffers=True)
            except lmdb.MapResizedError:
                pass
            if txn is not None:
                try:
                    yield txn
                finally:
                    txn.abort()
                return
        with self._gate.alone():
            self._env.set_mapsize(0)  # another process has grown the map: adopt its size
        with self.read() as txn:
            yield txn

    def _swapped(self) -> bool:
        try:
            return self.data_path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False

    def _follow_swap(self) -> None:
        """Reopen when another process has compacted the bank (the old file stays valid until then)."""
        if self._swapped():
            with Environment._open_guard:
                if self._swapped():
                    self._reopen()

    def write(self, work: Callable[[Any], T], expect_bytes: int = 0) -> T:
        """Run work(txn) and commit. It runs again from the start when the map has to grow; nothing partial stays.

        expect_bytes: what it will store, so that the map is grown before. Raises BankFull.
        """
        with self._write_guard:
            self._room(expect_bytes)
            while True:
                try:
                    with self._gate.shared(), self._env.begin(write=True, buffers=True) as txn:
                        return work(txn)
                except lmdb.MapFullError:
                    self._grow(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    with self._gate.alone():
                        self._env.set_mapsize(0)
                except (lmdb.Error, OSError) as error:
                    reason = full_reason(error, self.folder, expect_bytes, self.data_path)
                    if reason is None:
                        raise BankError(f"cannot write to the bank {self.folder}: {error}") from error
                    raise BankFull(
                        f"cannot write to the bank {self.folder}: {reason}. Everything committed before is intact; "
                        "free some space and run the same command again, it continues where it stopped"
                    ) from error

    def used_bytes(self) -> int:
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def _room(self, expect_bytes: int) -> None:
        need = self.used_bytes() + expect_bytes + expect_bytes // 8 + (256 << 10)
        if need > self._env.info()["map_size"]:
            self._grow(need)

    def _grow(self, need: int) -> None:
        size = self._env.info()["map_size"]
        while size < need:
            size += min(size, GROW_STEP)
        if self.max_bytes is not None and size > self.max_bytes:
            size = max(need, self.used_bytes())
            if size > self.max_bytes:
                raise BankFull(
                    f"the bank {self.folder} would need {size} bytes, max_bytes is {self.max_bytes}. Everything "
                    "committed before is intact; raise max_bytes, delete references or compact the bank"
                )
        size = -(-size // MIN_MAP) * MIN_MAP
        with self._gate.alone():
            self._env.set_mapsize(size)

    def stat(self) -> dict[str, dict[str, int]]:
        """Entries and pages of each sub-database."""
        with self.read() as txn:
            return {name: txn.stat(self._dbs[name]) for name in DATABASES}

    def info(self) -> dict[str, int]:
        return {**self._env.info(), "psize": self._env.stat()["psize"]}

    def swap(self, make: Callable[[Any, Path], None]) -> None:
        """Replace the data file by what make(env, folder) writes into a fresh folder as data.mdb. For compaction.

        Readers in other processes keep the old file until they next look, then follow.
        """
        fresh = self.folder / f".compact-{os.getpid()}"
        with self._write_guard:
            _remove(fresh)
            fresh.mkdir()
            try:
                make(self._env, fresh)
                _reserve_lock_file(fresh)
                with open(fresh / DATA_FILE, "rb") as file:
                    os.fsync(file.fileno())
                with self._gate.alone():
                    self._env.close()
                    try:
                        with open_lock(self.folder, exclusive=True):
                            # A lock file belongs to one data file: its transaction counter must not meet another's.
                            os.replace(fresh / LOCK_FILE, self.folder / LOCK_FILE)
                            os.replace(fresh / DATA_FILE, self.data_path)
                            sync_folder(self.folder)
                    finally:
                        self._start(0)
            except (lmdb.Error, OSError) as error:
                reason = full_reason(error, self.folder, self.used_bytes())
                if reason is None:
                    raise BankError(f"cannot compact {self.folder}: {error}; the bank is unchanged") from error
                raise BankFull(f"cannot compact {self.folder}: {reason}; the bank is unchanged") from error
            finally:
                _remove(fresh)


def open_lmdb(folder: Path, map_size: int, readonly: bool = False) -> Any:
    """lmdb.open with this package's settings; files only, never anonymous memory, and synced commits."""
    _reserve_lock_file(folder)
    options: dict[str, Any] = {"max_dbs": len(DATABASES) + 2, "max_readers": MAX_READERS}
    try:
        # Readers ask for single pages and announce records (ahead.py): read-around would bring in what nobody wants.
        return lmdb.open(
            str(folder), map_size=map_size, readonly=readonly, create=not readonly, readahead=not readonly, **options
        )
    except (lmdb.Error, OSError) as error:
        if readonly and _errno(error) in (errno.EACCES, errno.EROFS):
            # A read-only folder: no reader table. Safe while nobody writes, and here nobody can.
            return lmdb.open(
                str(folder), map_size=map_size, readonly=True, create=False, lock=False, readahead=False, **options
            )
        if _errno(error) in _FULL:
            raise BankFull(f"cannot open the bank {folder}: {_FULL[_errno(error) or 0]}") from error
        raise BankError(f"cannot open the bank {folder}: {error}") from error


def _reserve_lock_file(folder: Path) -> None:
    """Give LMDB's reader table its disk blocks now: it is written through a map, and on a full disk a hole in it
    would kill the process with SIGBUS. Only while this process has not opened the file (closing drops its locks).
    """
    size = -(-64 * (MAX_READERS + 2) // 4096) * 4096
    try:
        fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            return  # opened without a reader table below
        raise
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in _FULL:
            raise BankFull(f"cannot open the bank {folder}: {_FULL[error.errno]}; free {size} bytes") from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    finally:
        os.close(fd)


def full_reason(error: BaseException, folder: Path, expect_bytes: int, file: Path | None = None) -> str | None:
    """Why there is no room, or None. LMDB reports a write cut short by a full disk as a plain EIO."""
    number = _errno(error)
    if number != errno.EIO:
        return _FULL.get(number or 0)
    limit, size = resource.getrlimit(resource.RLIMIT_FSIZE)[0], file.stat().st_size if file else 0
    if limit != resource.RLIM_INFINITY and size + expect_bytes + (1 << 20) > limit:
        return _FULL[errno.EFBIG]
    disk = os.statvfs(folder)
    return _FULL[errno.ENOSPC] if disk.f_bavail * disk.f_frsize < expect_bytes + (1 << 20) else None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    code = getattr(error, "code", None)
    if isinstance(code, int) and code > 0:
        return code
    for number in (*_FULL, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(number) in str(error):
            return number
    return None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    for name in (DATA_FILE, LOCK_FILE):
        (folder / name).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()
