"""Benchmarks of memory3; `python -m bench --help`. They time; `tests/` decides what is right."""

import os

# As the command line does, before torch is imported: waiting threads of OpenMP must not spin on the cores of others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
