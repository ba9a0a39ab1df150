"""`memory3`: the command line. One file per command; heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point: exit code 0 done, 1 an error that says what to do, 2 wrong usage, 130 interrupted."""
    # Before torch starts its threads: waiting threads that spin for long make a shared machine ten times slower, and
    # those that sleep at once have to be woken for every small operation of a prompt.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .app import app
    from .common import report

    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not report(error):
            raise
        sys.exit(1)
