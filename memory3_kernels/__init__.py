"""Kernels for explicit memory: select, gather, dequantise and attend, as torch operators in the namespace `memory3`.

Importing needs torch alone: without the native library every op runs on its PyTorch reference
(`python -m memory3_kernels.doctor` says what is loaded and why not). `memory3_kernels.numpy_api`, the codec and the
record format on numpy arrays, needs the native library but no torch.
"""

from importlib.util import find_spec as _find_spec

if _find_spec("torch") is not None:
    from ._cuda import load as _load_cuda
    from ._load import load as _load_native
    from ._load import native_reason

    _load_native()
    _load_cuda()

    from ._backends import explain, use_backend
    from .book import Book
    from .int8 import Int8Weight, int8_pays, quantise_weight
    from .ops.decode_step import STAGES as DECODE_STAGES
    from .ops.decode_step import decode_step
    from .ops.gather_dequantize import gather_dequantize
    from .ops.gather_memory import gather_memory
    from .ops.int8_linear import int8_linear
    from .ops.memory_attention import memory_attention
    from .ops.memory_attention_backward import memory_attention_backward
    from .ops.memory_decode import memory_decode
    from .ops.memory_decode_coded import memory_decode_coded
    from .ops.merge_attention_states import merge_attention_states
    from .ops.packed_linear import packed_linear
    from .ops.scatter_memory import scatter_memory
    from .ops.select_tokens import select_tokens
    from .ops.vq_dequantize import vq_dequantize
    from .packed import (
        PackedWeight,
        PackedWeights,
        join_weights,
        mxint8_pays,
        pack_blocks,
        pack_weight,
        unpack_weight,
    )
else:  # numpy_api and the doctor still work

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"memory3_kernels.{name} needs torch, which is not installed: pip install 'torch>=2.11'")
        raise AttributeError(f"module 'memory3_kernels' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Book",
    "DECODE_STAGES",
    "decode_step",
    "explain",
    "gather_dequantize",
    "gather_memory",
    "int8_linear",
    "int8_pays",
    "Int8Weight",
    "join_weights",
    "memory_attention",
    "memory_attention_backward",
    "memory_decode",
    "memory_decode_coded",
    "merge_attention_states",
    "mxint8_pays",
    "native_reason",
    "pack_blocks",
    "pack_weight",
    "packed_linear",
    "PackedWeight",
    "PackedWeights",
    "quantise_weight",
    "scatter_memory",
    "select_tokens",
    "unpack_weight",
    "use_backend",
    "vq_dequantize",
]
