"""Hashes of files, read piece by piece."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE = 4 << 20  # bytes that are read at once

Step = Callable[[int], None]  # told the bytes of each piece


def digest(path: Path, kind: str, step: Step) -> str:
    """The hash of a file, hexadecimal. kind: "sha256", or "git-sha1" as git names its blobs."""
    with open(path, "rb") as file:
        if kind == "sha256":
            hasher = hashlib.sha256()
        else:
            hasher = hashlib.sha1(usedforsecurity=False)
            hasher.update(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        for piece in iter(lambda: file.read(PIECE), b""):
            hasher.update(piece)
            step(len(piece))
    return hasher.hexdigest()


def kind_of(expected: str) -> str:
    """The kind of a hash of the hub, which its length tells."""
    return "sha256" if len(expected) == 64 else "git-sha1"


def write(path: Path, content: Path | bytes, step: Step) -> tuple[int, str]:
    """Write a new file, or copy one, so that it lasts. Returns its bytes and its SHA-256."""
    hasher, size = hashlib.sha256(), 0
    with open(path, "xb") as out:
        for piece in _pieces(content):
            out.write(piece)
            hasher.update(piece)
            size += len(piece)
            step(len(piece))
        out.flush()
        os.fsync(out.fileno())
    return size, hasher.hexdigest()


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        yield from iter(lambda: file.read(PIECE), b"")
