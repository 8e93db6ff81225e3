"""From a model's files to weights that can be computed with: finds or makes the converted file.

A converted file lies in the cache folder: `QDELTA_CACHE`, else the platform's place for caches.
Its name has the model's and a hash of where the model is, so each source has its own. It is made
again when a file of the source changed (size or time), or when this version writes another layout
or has other formats in the recipe.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _native, gguf, hub_cache
from .cache import cache_folder
from .errors import ArgumentError, Error, FileAccessError, UnsupportedError
from .hub import SMALL_FILES
from .progress import byte_bar
from .source import tokenizer_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECIPES = ("balanced", "small", "fine", "best", "w8", "w4")
DEFAULT = RECIPES[0]
QUANTS = ("auto", "none", *RECIPES, "gguf")

# Below this, quant="auto" computes with the file's own weights: conversion would gain nothing.
SMALL_BYTES = 64 << 20
# Names of unknown tensors that are told, and characters of each.
_SHOWN = 3
_names = reprlib.Repr()
_names.maxstring = 100
_FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "I8", "I16", "I32", "I64")


def open_model(
    path: str | Path,
    quant: str = "auto",
    cache: str | Path | Literal[False] | None = None,
    progress: bool | None = None,
    *,
    threads: int | None = None,
) -> _native.Checkpoint:
    """Open a checkpoint folder, GGUF file or converted file, in the format `quant`.

    quant: one of QUANTS; "auto" is what a converted or quantised GGUF file already is, the file's
    own weights for models under 64 MB, and balanced otherwise. cache: folder for converted
    files; False: convert into memory, each time. progress: show a bar while converting; None: on a
    terminal. threads: for the conversion, as of `load`.

    Raises FileError, UnsupportedError, FileAccessError, or ArgumentError for an unknown quant.
    """
    check_quant(quant)
    source = open_checkpoint(path)
    quant = resolve_quant(source, path, quant)
    if quant == source.quant:
        return source
    if cache is False:
        return _convert(source, path, None, progress, quant=quant, threads=threads)
    out = converted_path(path, quant, cache)
    # Without the lock, so that a cache that may only be read serves: files appear whole.
    fresh = open_if_fresh(out, source)
    if fresh is not None:
        return fresh
    with locked(out):
        fresh = open_if_fresh(out, source)
        if fresh is not None:
            return fresh
        with _cache_errors(out):
            out.unlink(missing_ok=True)  # stale, or damaged beyond recognition
        return _convert(source, path, os.fspath(out), progress, quant=quant, threads=threads)


def open_checkpoint(path: str | Path) -> _native.Checkpoint:
    """Open it, and warn of tensors that would make it another model than this program runs."""
    source = _native.Checkpoint(os.fspath(path))
    if unknown := source.unknown_tensors():
        warnings.warn(f"{path}: {unused_text(unknown)}", stacklevel=2)
    return source


def unused_text(unknown: Sequence[str]) -> str:
    """What is to be said of tensors that are unknown, of which there is at least one."""
    some = ", ".join(map(_names.repr, unknown[:_SHOWN]))
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return f"tensors that Qwen3.5 does not have are not used: {some}{more}"


def check_quant(quant: str) -> None:
    """Raise ArgumentError unless `quant` is the name of a format, or "auto"."""
    if quant not in QUANTS:
        raise ArgumentError(f"quant is {quant!r}, expected one of: {', '.join(QUANTS)}")


def resolve_quant(source: _native.Checkpoint, path: str | Path, quant: str) -> str:
    """The format that `quant` means for `source`, which was opened from `path`.

    Raises UnsupportedError if it cannot be converted to that.
    """
    if source.quant != "none" and quant not in ("auto", source.quant):
        raise UnsupportedError(
            f"{path}: is already converted to {source.quant}, {quant!r} was asked for; "
            "convert the original checkpoint, which `qdelta pull` fetches"
        )
    if quant != "auto":
        return quant
    if source.quant != "none":
        return source.quant
    small = sum(entry[3] for entry in source.tensors()) < SMALL_BYTES
    return "none" if small else automatic(source)


def convert(
    source: _native.Checkpoint,
    path: str | Path,
    out: str | Path,
    *,
    quant: str,
    formats: dict[str, str] | None = None,
    importance: dict[str, NDArray[np.float32]] | None = None,
    progress: bool | None = None,
    threads: int | None = None,
) -> None:
    """Write `source`, which was opened from `path`, to the file `out` by the recipe `quant`.

    formats, importance: see `_native.convert`. The files of the tokenizer and the template travel
    along, so that it is a whole model.
    """
    _convert(
        source,
        path,
        os.fspath(out),
        progress,
        quant=quant,
        formats=formats,
        importance=importance,
        threads=threads,
    )


def _convert(
    source: _native.Checkpoint,
    path: str | Path,
    out: str | None,
    progress: bool | None,
    **how: Any,
) -> _native.Checkpoint:
    """Convert to the file `out`, or into memory if it is None; returns what was converted."""
    path = Path(path)
    attachments: list[tuple[str, str | bytes]]
    if path.is_dir():
        files = (name for name in SMALL_FILES if (path / name).is_file())
        attachments = [(name, os.fspath(path / name)) for name in files]
    else:
        attachments = list(tokenizer_files(path, source).items())
    with byte_bar(f"Converting {path.resolve().name} to {how['quant']}", progress) as report:
        converted = _native.convert(source, out, attachments=attachments, progress=report, **how)
    return converted or _native.Checkpoint(out or "")


def convert_to_gguf(
    source: _native.Checkpoint,
    path: str | Path,
    out: str | Path,
    *,
    dtype: str,
    progress: bool | None = None,
    threads: int | None = None,
) -> None:
    """Write `source`, which was opened from `path`, as the GGUF file `out`.

    dtype: one of `gguf.TYPES`. Raises ArgumentError if `out` exists, UnsupportedError for weights
    that are quantised already, FileError or FileAccessError.
    """
    path = Path(path)
    called = path.resolve().name.removesuffix(".gguf")
    text = json.loads(source.config_json)
    vocab_size = text.get("text_config", text)["vocab_size"]
    metadata = gguf.metadata(
        tokenizer_files(path, source),
        name=called,
        licence=_licence(source, path),
        vocab_size=vocab_size,
    )
    with byte_bar(f"Writing {called} as {dtype}", progress) as report:
        _native.export_gguf(
            source,
            os.fspath(out),
            dtype=dtype,
            metadata=metadata,
            threads=threads,
            progress=report,
        )


def _licence(source: _native.Checkpoint, path: Path) -> str | None:
    """The licence as a GGUF file states it, or the card of a model on the hub."""
    stated = source.gguf_value("general.license")
    if isinstance(stated, str):
        return stated
    try:
        card = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # cards are for people; none is needed
    first, _, rest = card.partition("\n")
    front, end, _ = rest.partition("\n---")
    found = re.search(r"^license: *([\w.+-]+) *$", front, re.MULTILINE)
    return found[1] if first == "---" and end and found else None


def automatic(source: _native.Checkpoint) -> str:
    """The recipe that a checkpoint is converted by if nobody says."""
    quantised = any(dtype not in _FLOATS for _, dtype, _, _, _ in source.tensors())
    return "gguf" if quantised else DEFAULT


def converted_path(path: str | Path, quant: str, cache: str | Path | None = None) -> Path:
    """Where the converted form of the model at `path` is kept."""
    given = Path(os.path.abspath(path))
    # The hub's cache has a folder for each revision below the model's. A new revision takes the
    # place of the old one, or its converted file if the weights are the same.
    if found := hub_cache.snapshot_of(given):
        _, snapshot = found
        given = snapshot.parent.parent / given.relative_to(snapshot)
    key = hashlib.sha256(os.fsencode(given)).hexdigest()[:16]
    return cache_folder(cache) / f"{given.name}-{key}.{quant}.safetensors"


def open_if_fresh(out: Path, source: _native.Checkpoint) -> _native.Checkpoint | None:
    """The converted file, if it is there, and is what this version would make of `source`."""
    if not out.exists():
        return None
    try:
        converted = _native.Checkpoint(os.fspath(out))
    except FileAccessError:
        raise
    except Error:
        return None  # of another version, or damaged: it is made again
    return converted if converted.is_conversion_of(source) else None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from making the same file or folder meanwhile."""
    with _cache_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{out}.lock", "a+b")  # noqa: SIM115
    with lock:
        # File systems without locks are no harm: the work is done twice, and the last file stays.
        with suppress(OSError):
            if sys.platform == "win32":
                import msvcrt

                lock.seek(0)
                msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            for path in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
                if path.is_file():  # of a process that was killed; nobody else writes here now
                    path.unlink()
        yield  # closing the file unlocks it


@contextmanager
def _cache_errors(out: Path) -> Iterator[None]:
    """Turns refusals of the cache folder into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise FileAccessError(
            error.errno or 0,
            f"the cache folder cannot be written ({error.strerror}); choose another with cache= "
            "or QDELTA_CACHE",
            os.fspath(out.parent),
        ) from error
