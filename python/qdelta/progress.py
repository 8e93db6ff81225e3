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


@contextmanager
def step_counter(text: str, total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """The same for work that is told piece by piece: gives the function to call with its bytes."""
    done = 0
    with byte_bar(text, progress) as report:

        def step(size: int) -> None:
            nonlocal done
            done += size
            if report is not None:
                report(done, total)

        yield step


class StepBar:
    """A bar of steps on standard error, if it is wanted; to be entered."""

    def __init__(self, steps: int, progress: bool | None = None) -> None:
        self._steps = steps
        self._wanted = wanted(progress)

    def __enter__(self) -> StepBar:
        if self._wanted:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,  # results go where standard output goes
            )
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._wanted:
            self._bar.stop()

    def describe(self, text: str) -> None:
        """Say what is being done."""
        if self._wanted:
            self._bar.update(self._task, description=text)

    def step(self) -> None:
        if self._wanted:
            self._bar.advance(self._task)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Out of the way while something is written to the terminal."""
        if self._wanted:
            self._bar.stop()
        yield
        if self._wanted:
            self._bar.start()
