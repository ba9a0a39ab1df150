"""The GPU kernels: what can be known of them without a GPU, and what the first machine with one says."""

from . import check, proof, roofline

COMMANDS = {"gpu-check": check, "gpu-proof": proof, "roofline": roofline}
