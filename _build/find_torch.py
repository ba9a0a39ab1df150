"""Finds an installed torch without importing it.

pip's isolated builds hide site-packages from sys.path, but sys.prefix and sysconfig still point at the environment, so
its headers can be found and nothing is downloaded again.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path

PROBE = "include/torch/csrc/stable/library.h"


def find() -> Path | None:
    """The folder of a torch with stable-ABI headers: M3_TORCH_DIR, this environment's, or None."""
    paths = sysconfig.get_paths()
    folders = [*sys.path, paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if sys.prefix == sys.base_prefix and site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    candidates = [Path(folder) / "torch" for folder in folders]
    if os.environ.get("M3_TORCH_DIR"):
        candidates.insert(0, Path(os.environ["M3_TORCH_DIR"]))
    return next((c for c in candidates if (c / PROBE).is_file()), None)
