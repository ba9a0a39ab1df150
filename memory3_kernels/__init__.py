"""Kernels for explicit memory: select, gather, dequantise and attend, as torch operators in the namespace `memory3`.

Importing needs torch alone: without the native library every op runs on its PyTorch reference
(`python -m memory3_kernels.doctor` says what is loaded and why not).
"""

from ._load import load as _load_native

_load_native()

from ._backends import explain, use_backend  # noqa: E402
from .book import Book  # noqa: E402
from .ops.gather_dequantize import gather_dequantize  # noqa: E402
from .ops.gather_memory import gather_memory  # noqa: E402
from .ops.memory_attention import memory_attention  # noqa: E402
from .ops.memory_attention_backward import memory_attention_backward  # noqa: E402
from .ops.memory_decode import memory_decode  # noqa: E402
from .ops.merge_attention_states import merge_attention_states  # noqa: E402
from .ops.scatter_memory import scatter_memory  # noqa: E402
from .ops.select_tokens import select_tokens  # noqa: E402
from .ops.vq_dequantize import vq_dequantize  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Book",
    "explain",
    "gather_dequantize",
    "gather_memory",
    "memory_attention",
    "memory_attention_backward",
    "memory_decode",
    "merge_attention_states",
    "scatter_memory",
    "select_tokens",
    "use_backend",
    "vq_dequantize",
]
