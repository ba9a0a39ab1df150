"""Benchmarks of memory3; `python -m bench --help`. They time; `tests/` decides what is right."""

import os

# As the command line does, before torch is imported: waiting threads of OpenMP spin for some microseconds, not for
# milliseconds on the cores of others.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
