"""memory3: explicit memory for decoder language models (Memory3, arXiv 2407.01178).

Importing this package loads nothing heavy; names below are fetched from their module at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "ModelConfig": "memory3.config",
    "MemoryConfig": "memory3.config",
    "PRESETS": "memory3.config",
    "Memory": "memory3.memory",
    "MemoryRead": "memory3.memory",
    "Identity": "memory3.identity",
    "load_model": "memory3.model.load",
    "MemoryModel": "memory3.model.load",
    "Llama": "memory3.model.llama",
    "KVCache": "memory3.model.cache",
    "ContextFull": "memory3.model.cache",
    "Bank": "memory3.bank",
    "Embedder": "memory3.embed",
    "Engine": "memory3.engine",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'memory3' has no attribute {name!r}; it has {', '.join(sorted(_EXPORTS))}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
