"""Fixtures: the demo checkpoint, and a cache of converted files that lasts one run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep converted files out of the user's cache, from before the first import on."""
    config.qdelta_cache = tempfile.mkdtemp(prefix="qdelta-tests-")
    os.environ["QDELTA_CACHE"] = config.qdelta_cache


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.qdelta_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The trained toy that travels in the package."""
    from qdelta import demo

    return Path(demo.path())
