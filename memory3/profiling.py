"""Where the time of a run goes, stage by stage; every second is counted once, in the innermost stage.

    with collect() as profile:
        ...                       # code with `with span("linear"):` around its parts
    profile.seconds               # {"linear": ..., "attention": ..., "Python": ...}

Without `collect`, a span costs a fraction of a microsecond. Collected per thread: what a prefetch thread does is not
part of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_here = threading.local()
_nothing = nullcontext()
REST = "Python"


class Profile:
    """Exclusive seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = [0.0]  # per open span, seconds that belong to spans inside it

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds of the innermost open span as those of another stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._within[-1] += seconds


class _Span:
    __slots__ = ("_begin", "_name", "_profile")

    def __init__(self, profile: Profile, name: str) -> None:
        self._profile, self._name = profile, name

    def __enter__(self) -> None:
        self._profile._within.append(0.0)
        self._begin = time.perf_counter()

    def __exit__(self, *exc) -> None:
        whole = time.perf_counter() - self._begin
        within = self._profile._within.pop()
        self._profile.add(self._name, whole - within)
        self._profile._within[-1] += within


def active() -> Profile | None:
    """The profile this thread collects, if it does."""
    return getattr(_here, "profile", None)


def span(name: str) -> AbstractContextManager:
    """Counts the time of a block as stage `name`, less what inner spans count."""
    profile = active()
    return _nothing if profile is None else _Span(profile, name)


@contextmanager
def collect() -> Iterator[Profile]:
    """Collects the spans of this thread; what is in none of them becomes the stage "Python"."""
    before, _here.profile = active(), Profile()
    try:
        with _Span(_here.profile, REST):
            yield _here.profile
    finally:
        _here.profile = before
