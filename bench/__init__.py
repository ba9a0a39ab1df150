"""Benchmarks of memory3; `python -m bench --help`. They time; `tests/` decides what is right."""
