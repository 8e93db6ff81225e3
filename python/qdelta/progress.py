"""Progress bars for long work: on a terminal, and never in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def wanted(progress: bool | None) -> bool:
    """Whether to show a bar: as the caller said, else if standard error is a terminal."""
    # Programs without a console have no standard error.
    return bool(sys.stderr and sys.stderr.isatty()) if progress is None else progress


@contextmanager
def byte_bar(text: str, progress: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on standard error for the time of the block.

    Gives the function to call with (bytes done, bytes in all), or None if no bar is wanted.
    """
    if not wanted(progress):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,  # elsewhere it is written once, at the end
    ) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
