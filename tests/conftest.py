"""Fixtures: stored values, checkpoints, and a cache of converted files that lasts one run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tiny import make_checkpoint


def pytest_configure(config: pytest.Config) -> None:
    """Keep converted files out of the user's cache, from before the first import on."""
    config.qdelta_cache = tempfile.mkdtemp(prefix="qdelta-tests-")
    os.environ["QDELTA_CACHE"] = config.qdelta_cache


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.qdelta_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """The stored reference values."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The trained toy that travels in the package."""
    from qdelta import demo

    return Path(demo.path())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small valid checkpoint of one file, MTP block included, to be damaged."""
    return make_checkpoint(tmp_path / "checkpoint", tokenizer=False, mtp=True)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in three files and an index, without MTP."""
    return make_checkpoint(tmp_path / "sharded", tokenizer=False, shards=3)
