"""PEP 517/660 backend: setuptools, asking for torch as a build requirement only where none is installed."""

import find_torch
from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if find_torch.find() else [*requirements, "torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(_setuptools.get_requires_for_build_editable(config_settings))
