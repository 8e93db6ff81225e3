"""Exceptions of qdelta.

Every one derives from `Error`, and from the built-in exception that a caller would expect, so
`except ValueError` and `except OSError` work as well. The extension module raises these same
classes; their constructors are part of the agreement with it.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ContextError",
    "Error",
    "FileAccessError",
    "FileError",
    "MemoryLimitError",
    "UnsupportedError",
]


class Error(Exception):
    """Base of all exceptions that qdelta raises on its own account."""


class ArgumentError(Error, ValueError):
    """A value that a caller passed is outside what the function accepts."""


class FileError(Error, ValueError):
    """A file is damaged, or disagrees with the configuration beside it."""


class UnsupportedError(Error):
    """A valid request or file that this version cannot serve."""


class FileAccessError(Error, OSError):
    """The operating system refused to open, read or write a file.

    Constructed like OSError: (errno, message, file name).
    """


class ContextError(Error, ValueError):
    """More tokens are needed than the context holds.

    needed: tokens that the call has to place, those already held included.
    available: tokens that the context holds in all.
    """

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed = needed
        self.available = available

    def __str__(self) -> str:
        return f"{self.needed} tokens needed, the context holds {self.available}"


class MemoryLimitError(Error, MemoryError):
    """More memory is needed than `memory_limit` allows.

    needed: bytes that the model, its sessions and their snapshots would hold. limit: bytes that
    they may. The text says what takes them, and when loading what would fit.
    """

    def __init__(self, text: str, needed: int, limit: int) -> None:
        super().__init__(text, needed, limit)
        self.needed = needed
        self.limit = limit

    def __str__(self) -> str:
        return str(self.args[0])
