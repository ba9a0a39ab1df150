"""zlib's CRC-32, by ISA-L where that is installed: at the rate of memory, where zlib takes longer than copying."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
