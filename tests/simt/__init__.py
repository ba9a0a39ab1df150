"""CUDA kernels on a CPU: the host (simt.h), its build, and the op calls that go through the CUDA bindings."""
