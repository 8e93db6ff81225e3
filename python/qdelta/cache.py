"""Where converted files are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where converted files are kept: `cache`, `QDELTA_CACHE`, or the platform's place."""
    given = cache or os.environ.get("QDELTA_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "qdelta" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qdelta"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qdelta"
