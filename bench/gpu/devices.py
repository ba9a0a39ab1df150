"""The GPUs that predictions are made for: figures of their makers, and what an SM of each holds."""

from __future__ import annotations

from dataclasses import dataclass

RESERVED_SHARED = 1024  # bytes per block that CUDA keeps for itself, from compute capability 8.0 on


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        arch: compute capability, as in 90.
        gb_s: bandwidth of its memory.
        tflops: bf16 products with fp32 sums on dense matrices, tensor cores.
        sms, l2: multiprocessors; bytes of second-level cache.
        shared, threads, blocks: what an SM holds at most.
        source: where gb_s, tflops, sms and l2 stand; the rest: CUDA C++ Programming Guide, compute capabilities.
    """

    name: str
    arch: int
    gb_s: float
    tflops: float
    sms: int
    l2: int
    shared: int
    threads: int
    blocks: int
    source: str

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks of a kernel on one SM: what its threads, registers (a warp's come in units of 256) and shared memory
        leave room for."""
        warps = -(-threads // 32)
        by_registers = 65536 // (warps * -(-registers * 32 // 256) * 256)
        return min(self.blocks, self.threads // (32 * warps), by_registers, self.shared // (shared + RESERVED_SHARED))


KIB, MIB = 1 << 10, 1 << 20
DEVICES = {
    d.name: d
    for d in (
        Device("A100 80GB SXM", 80, 2039, 312, 108, 40 * MIB, 164 * KIB, 2048, 32,
               "NVIDIA A100 Tensor Core GPU datasheet; A100 architecture whitepaper"),
        Device("H100 SXM", 90, 3350, 989, 132, 50 * MIB, 228 * KIB, 2048, 32,
               "NVIDIA H100 Tensor Core GPU datasheet; H100 architecture whitepaper"),
        Device("H200 SXM", 90, 4800, 989, 132, 50 * MIB, 228 * KIB, 2048, 32,
               "NVIDIA H200 Tensor Core GPU datasheet"),
        Device("B200 SXM", 100, 8000, 2250, 148, 126 * MIB, 228 * KIB, 2048, 32,
               "NVIDIA DGX B200 datasheet, an eighth of the system; Blackwell tuning guide"),
        Device("RTX 4090", 89, 1008, 165.2, 128, 72 * MIB, 100 * KIB, 1536, 24,
               "NVIDIA Ada GPU architecture whitepaper (FP16 tensor, FP32 accumulate)"),
    )
}  # fmt: skip


def like(name: str) -> Device | None:
    """The entry a CUDA device's own name belongs to ("NVIDIA H100 80GB HBM3"), or None."""
    for key, words in (("H200 SXM", "H200"), ("H100 SXM", "H100"), ("A100 80GB SXM", "A100"), ("B200 SXM", "B200"),
                       ("RTX 4090", "RTX 4090")):  # fmt: skip
        if words in name and "PCIe" not in name and "NVL" not in name and not name.endswith("4090 D"):
            return DEVICES[key]
    return None
