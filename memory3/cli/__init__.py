"""`memory3`: the command line. One file per command; heavy imports happen inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: exit code 0 done, 1 an error that says what to do, 2 wrong usage, 130 interrupted."""
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
