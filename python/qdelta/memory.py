"""Numbers of bytes: as people write and read them, and how many this computer has."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from .errors import ArgumentError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.ASCII | re.IGNORECASE)
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_bytes(size: int | str, name: str) -> int:
    """A number of bytes from itself or a text like "6 GB" (powers of 1000) or "6GiB" (of 1024).

    name: of the option, for errors. Raises ArgumentError.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match:
            number, unit, binary = match.groups()
            power = "kmgt".index(unit.lower()) + 1 if unit else 0
            size = int(float(number) * (1024 if binary else 1000) ** power)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ArgumentError(f'{name} is {size!r}, expected bytes, or a text like "6 GB" or "6GiB"')
    return size


def size_text(n: int) -> str:
    """A size that a person can read."""
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def usable_memory() -> int | None:
    """Bytes that a program could have now; None if the system does not tell.

    On Linux what is free or can be freed, at most the container's limit; on other Unix systems
    all memory of the computer.
    """
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        return min([int(free.split()[1]) * 1024, *_container_limits()])
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_limits() -> list[int]:
    limits = []
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(Path(path).read_text()))
    return limits
