"""Metadata stands in pyproject.toml; this file hands the native build to _build/native.py. torch is not imported."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "_build"))
import native


class NativeBuild(build_ext):
    def run(self) -> None:
        root = Path(__file__).parent
        target = root if self.inplace or self.editable_mode else Path(self.build_lib)
        native.build(target / "memory3_kernels")

    def get_outputs(self) -> list[str]:
        return []


# One extension, so that wheels carry the interpreter's tag: the numpy module is per Python version.
setup(ext_modules=[Extension("memory3_kernels._numpy", [])], cmdclass={"build_ext": NativeBuild})
