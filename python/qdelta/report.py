"""Results of `qdelta bench` as text, a piece when a test is done; and read back from it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .bench import PeerResult, Row
from .errors import FileAccessError, FileError
from .profiling import PARTS, Part

T = TypeVar("T")


class Report(Protocol):
    """Text of results; pieces may be empty and end without a line break."""

    def add(self, row: Row) -> str:
        """What to write now that this test is done."""

    def end(self) -> str:
        """What to write behind the last one."""


class Json:
    """One document at the end."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def add(self, row: Row) -> str:
        self._entries.append(asdict(row))
        return ""

    def end(self) -> str:
        return json.dumps(self._entries, indent=2)


class JsonLines:
    """A document a line."""

    def add(self, row: Row) -> str:
        return json.dumps(asdict(row))

    def end(self) -> str:
        return ""


class Csv:
    """A line of field names, then a line a test; lists and objects are JSON in their cell."""

    def __init__(self) -> None:
        self._begun = False

    def add(self, row: Row) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        entry = asdict(row)
        if not self._begun:
            writer.writerow(entry)
            self._begun = True
        writer.writerow(
            json.dumps(value) if isinstance(value, (list, dict)) else value
            for value in entry.values()
        )
        return out.getvalue().rstrip("\n")

    def end(self) -> str:
        return ""


class Markdown:
    """A table of all tests; behind it limits, the other program, and profiles.

    limits: whether the limits of the machine are measured, for which there is a column then.
    """

    def __init__(self, *, limits: bool = False) -> None:
        self._rows: list[Row] = []
        # Name, width at least, content.
        self._columns: list[tuple[str, int, Callable[[Row], str]]] = [
            ("model", 0, lambda row: row.model_type),
            ("size", 10, lambda row: _scaled(row.model_size, 2**30, "GiB", 2**20, "MiB")),
            ("params", 8, lambda row: _scaled(row.model_n_params, 10**9, "B", 10**6, "M")),
            ("isa", 0, lambda row: row.isa),
            ("threads", 0, lambda row: str(row.n_threads)),
            ("kv", 0, lambda row: row.type_k),
            ("test", 14, lambda row: row.test),
            ("t/s", 18, lambda row: f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}"),
            ("GB/s", 5, lambda row: f"{row.gb_per_s:.1f}" if row.gb_per_s else "-"),
            ("peak RSS", 0, lambda row: f"{row.peak_rss / 2**20:.0f} MiB" if row.peak_rss else "-"),
        ]
        if limits:
            of_ceiling = ("of ceiling", 0, lambda row: f"{row.of_ceiling or 0:.2f}")
            self._columns.insert(-1, of_ceiling)

    def add(self, row: Row) -> str:
        cells = [cell(row) for _, _, cell in self._columns]
        lines = []
        if not self._rows:
            # Later rows are not known yet: those of the first, or a column's own width, must do.
            self._widths = [
                max(len(name), width, len(cell))
                for (name, width, _), cell in zip(self._columns, cells, strict=True)
            ]
            lines.append(self._line([name for name, _, _ in self._columns]))
            lines.append("|" + "|".join("-" * (width + 2) for width in self._widths) + "|")
        self._rows.append(row)
        return "\n".join([*lines, self._line(cells)])

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    def end(self) -> str:
        parts = [*map(_profile_table, [row for row in self._rows if row.profile])]
        if any(row.against for row in self._rows):
            parts.insert(0, _against_table(self._rows))
        known = {(row.isa, row.n_threads): row.limits for row in self._rows if row.limits}
        if known:
            parts.insert(0, "\n".join(_limits_line(*key, each) for key, each in known.items()))
        return "".join("\n" + part + "\n" for part in parts).rstrip("\n")


def _limits_line(isa: str, threads: int, limits: dict[str, float]) -> str:
    return (
        f"limits, {isa}, {threads} threads: memory {limits['read_one'] / 1e9:.1f} GB/s with "
        f"one thread and {limits['read_all'] / 1e9:.1f} with all, int8 "
        f"{limits['int8_peak'] / 1e9:.0f} and f32 {limits['f32_peak'] / 1e9:.0f} Gop/s a thread"
    )


def _scaled(value: int, large: int, unit: str, small: int, small_unit: str) -> str:
    """As llama-bench writes it, in the smaller unit below one tenth of the larger."""
    if value >= large / 10:
        return f"{value / large:.2f} {unit}"
    return f"{value / small:.2f} {small_unit}"


def _against_table(rows: Sequence[Row]) -> str:
    """Both programs and their ratio, a test a line."""
    return table(
        "",
        ("test", "threads", "ours", "t/s", "theirs", "t/s", "ours / theirs"),
        [
            (
                row.test,
                str(row.n_threads),
                row.model_type,
                f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
                theirs.model_type,
                f"{theirs.avg_ts:.2f} ± {theirs.stddev_ts:.2f}",
                f"{theirs.ratio:.2f} ({theirs.ratio_min:.2f} to {theirs.ratio_max:.2f})",
            )
            for row in rows
            if (theirs := row.against)
        ],
    )


def _profile_table(row: Row) -> str:
    """Where the time of a test goes, a part a line; the rest only if it can be seen."""
    parts = row.profile or {}
    unit = "Gop/s" if row.n_prompt else "GB/s"
    lines = []
    for name, part in parts.items():
        if name == "other" and part.share < 0.005:
            continue
        rate = part.gop_per_s if row.n_prompt else part.gb_per_s
        cells = (f"{part.share:.1%}", f"{part.us_per_token:.1f}", f"{rate:.1f}" if rate else "-")
        lines.append((label(name), *cells))
    title = f"{row.test}, {row.model_type}, {threads(row)}: where the time goes"
    return table(title, ("part", "share", "us/token", unit), lines)


def threads(row: Row) -> str:
    """The number of threads in words."""
    return f"{row.n_threads} thread" + "s" * (row.n_threads != 1)


def label(part: str) -> str:
    """The name of a part of a profile as people read it."""
    return "Python" if part == "python" else part.replace("_", " ")


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its title above; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for i, name in enumerate(columns):
        numbers = all(line[i][:1].isdigit() or line[i] == "-" for line in lines)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(Text, line))
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    text = out.getvalue().strip()  # its first and last line are blank
    return f"{title}\n\n{text}" if title else text


# ------------------------------------------------------------------------------------ reading


def read_entries(path: str | Path, command: str) -> list[Any]:
    """What `command` wrote: a list, or a document a line.

    Raises FileAccessError or FileError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileAccessError(error.errno, error.strerror, str(path)) from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        if text.lstrip().startswith("["):
            entries: list[Any] = json.loads(text)
            return entries
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise FileError(f"{path}: not the JSON of `{command}`: {error}") from None


def read_rows(path: str | Path) -> list[Row]:
    """Rows that `-o json` or `-o jsonl` wrote.

    Raises FileAccessError, or FileError naming the entry if they are something else.
    """
    command = "qdelta bench -o json"
    rows = []
    for i, entry in enumerate(read_entries(path, command)):
        place = f"{path}: entry {i}"
        row = build(Row, entry, place, command)
        if row.against is not None:
            row.against = build(PeerResult, row.against, f"{place}: against", command)
        if row.profile is not None:
            if not isinstance(row.profile, dict):
                raise FileError(f"{place}: `profile` is not an object")
            parts = {name: row.profile.get(name) for name in PARTS}
            row.profile = {
                name: build(Part, part, f"{place}: profile: {name}", command)
                for name, part in parts.items()
            }
        rows.append(row)
    return rows


_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}


def build(made: type[T], entry: Any, place: str, command: str) -> T:
    """A dataclass from what `asdict` made of it; fields it does not have are passed over.

    command: what writes such entries. Raises FileError for anything else.
    """
    if not isinstance(entry, dict):
        raise FileError(f"{place}: {json.dumps(entry)[:40]}, expected an object")
    values = {}
    for field in fields(made):  # type: ignore[arg-type]
        if field.name not in entry:
            if field.default is MISSING:
                raise FileError(f"{place}: no `{field.name}`, as `{command}` writes it")
            continue
        value = values[field.name] = entry[field.name]
        kind, _, optional = str(field.type).partition(" | ")
        if value is None and optional:
            continue
        if kind in _KINDS and (not isinstance(value, _KINDS[kind]) or isinstance(value, bool)):
            found = json.dumps(value)[:40]
            raise FileError(f"{place}: `{field.name}` is {found}, expected {kind}")
    return made(**values)
