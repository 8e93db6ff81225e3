"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ..errors import ArgumentError, FileError
from ..progress import wanted

if TYPE_CHECKING:
    from rich.console import Console

# As in `qdelta.weights`, which takes long to import.
RECIPES = ("balanced", "small", "fine", "best", "w8", "w4")
QUANTS = ("auto", "none", *RECIPES, "gguf")
KVS = ("auto", "f16", "f32", "q8")
# As in `qdelta.sizes`, likewise.
SIZE_NAMES = ("0.8B", "2B", "4B", "9B")

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

yarn_option = click.option(
    "--yarn",
    type=float,
    metavar="FACTOR",
    help="Extend the context FACTOR times (YaRN), as 4 for a million tokens of a 4B or 9B; "
    "may harm short texts. Default: what config.json says; 1: not at all.",
)

revision_option = click.option(
    "--revision", metavar="R", help="Branch, tag or commit on the hub; default: main."
)

threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), help="Threads; default: one per core."
)

head_option = click.option(
    "--head",
    type=click.Choice(["full", "screened"]),
    default="full",
    show_default=True,
    help="screened: find the likeliest tokens with part of the head's bytes; see `eval`.",
)

isa_option = click.option("--isa", help="Instruction set, as avx512 or avx2; default: the best.")

cache_option = click.option(
    "--cache", type=click.Path(file_okay=False), help="Folder for converted files."
)

offline_option = click.option("--offline", is_flag=True, help="Touch no network.")

json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")


def plot_option(what: str) -> Callable[[F], F]:
    """--plot, which does `what`; see `check_plot`."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help=f"{what} as .svg or .png (pip install 'qdelta[plot]').",
    )


def saved_option(help: str) -> Callable[[F], F]:
    """--from, saved results that --plot draws."""
    return click.option(
        "--from",
        "saved",
        type=click.Path(exists=True, dir_okay=False),
        multiple=True,
        metavar="FILE",
        help=help,
    )


def check_plot(plot: str | None, saved: tuple[str, ...]) -> None:
    """Raise UsageError if a plot cannot be drawn, before anything is measured for it."""
    if plot is None:
        if saved:
            raise click.UsageError("--from is for --plot")
        return
    from ..plots import check

    try:
        check(plot)
    except ArgumentError as error:
        raise click.UsageError(f"--plot: {error}") from None


def counts(text: str) -> list[int]:
    """Numbers separated by commas, as llama-bench takes them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers separated by commas") from None
    if any(number < 0 for number in numbers):
        raise click.BadParameter(f"{text!r}: expected no negative number")
    return numbers


_LOADING = (
    revision_option,
    click.option(
        "--quant",
        type=click.Choice(QUANTS),
        default="auto",
        show_default=True,
        help="Recipe by which the weights are converted, once; none: as the files have them; gguf: "
        "those of a GGUF file in another order. auto: balanced, gguf for quantised GGUF files.",
    ),
    click.option("--ctx", type=click.IntRange(min=1), help="Tokens a conversation can hold."),
    yarn_option,
    threads_option,
    click.option(
        "--kv",
        type=click.Choice(KVS),
        default="auto",
        show_default=True,
        help="Precision of the attention cache.",
    ),
    isa_option,
    head_option,
    click.option(
        "--memory-limit",
        metavar="SIZE",
        help='What model and conversations may take, as "6 GB" or "6GiB"; without --ctx the '
        "context is what fits.",
    ),
    cache_option,
    offline_option,
)

_SAMPLING = (
    click.option("-n", "--max-tokens", type=click.IntRange(min=0), help="Stop after this many."),
    click.option("--temperature", type=click.FloatRange(min=0), help="0: the most likely token."),
    click.option("--top-k", type=click.IntRange(min=0), help="Only the K most likely; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1), help="Only the most likely, up to P."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Only above P times the best."),
    click.option("--presence-penalty", type=float, help="Against what was said once."),
    click.option("--seed", type=int, help="Repeat a run exactly."),
    click.option(
        "--preset",
        default="auto",
        show_default=True,
        help="Sampling profile of the model card: chat, thinking, coding, reasoning, greedy.",
    ),
)


def loading_options(command: F) -> F:
    """Options of `qdelta.load`."""
    return _apply(_LOADING, command)


def sampling_options(command: F) -> F:
    """Options of a generation."""
    return _apply(_SAMPLING, command)


def _apply(options: tuple[Callable[[F], F], ...], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def read_text(file: BinaryIO, name: str) -> str:
    """All of a file as UTF-8. Raises FileError if it is something else."""
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{name}: not UTF-8 at byte {error.start}") from None


def table_console() -> Console:
    """Standard output for tables."""
    from rich.console import Console

    # Names may hold brackets, which are no markup. In a pipe nothing is cut to a width.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 1000)


def printable(text: str) -> str:
    """The text with characters escaped that would steer a terminal; names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """A text of a file for a table: printable, and not without end."""
    most = 200
    return printable(text if len(text) <= most else text[:most] + "…")


def print_unused(console: Console, unknown: Sequence[str]) -> None:
    """A line of the tensors that Qwen3.5 does not have, if there are any."""
    from ..weights import unused_text

    if unknown:
        console.print(unused_text(unknown))


def given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options that were given on the command line, of those named."""
    return {name: options[name] for name in names if options[name] is not None}


SAMPLING_NAMES = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "seed", "preset",
)  # fmt: skip
LOADING_NAMES = (
    "revision", "quant", "ctx", "yarn", "threads", "kv", "isa", "head", "memory_limit", "cache",
    "offline",
)  # fmt: skip


def reading(work: Callable[[Callable[[int, int], None]], T]) -> T:
    """The result of `work`, which reports its progress to a bar."""
    with click.progressbar(
        length=1, label="Reading", file=sys.stderr, hidden=not wanted(None)
    ) as bar:

        def report(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        return work(report)
