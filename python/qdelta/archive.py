"""A model as one folder that needs nothing else and can be proven whole.

The folder holds the weights, the tokenizer's files, the papers, and `qdelta-manifest.json` with
the SHA-256 of every file and where the model came from ("origin"). It is made under another name
beside its place and renamed when all of it is written. [docs/keeping.md] describes it.

*Kept* models are such folders in the cache, `kept/models--OWNER--NAME`: what a name means before
the hub is looked at.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from . import digests
from .errors import ArgumentError, FileAccessError, FileError
from .progress import step_counter

MANIFEST = "qdelta-manifest.json"
FORMAT = 1

Content = Path | bytes | Callable[[Path], None]  # a file to copy, or who writes it to a path

_MOST_MANIFEST = 16 << 20
_PLAIN = re.compile(r"[^/\\:\0]+")  # a name that cannot lead out of its folder


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the folder says of itself."""

    model: str  # the file to open, "." for the folder itself
    quant: str  # "none", "w8", "w4" or "gguf"
    name: str | None  # what it was called on the hub, None for a model from elsewhere
    revision: str | None  # the commit on the hub
    creator: str
    created: str
    files: tuple[Entry, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none. Raises FileError if it is not valid."""
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _access(error) from error
    try:
        if len(text) > _MOST_MANIFEST:
            raise ValueError(f"more than {_MOST_MANIFEST} bytes")
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileError(f"{path}: not a valid manifest: {type(error).__name__}: {error}") from error


def _parse(value: dict[str, object]) -> Manifest:
    value = dict(value)
    version = value.pop("format")
    if version != FORMAT:
        raise ValueError(f"format is {reprlib.repr(version)}, this program reads {FORMAT}")
    listed = value.pop("files")
    if not isinstance(listed, list):
        raise ValueError("`files` is not a list")
    files = tuple(Entry(**entry) for entry in listed)
    manifest = Manifest(**value, files=files)  # type: ignore[arg-type]
    texts = [manifest.model, manifest.quant, manifest.creator, manifest.created]
    texts += [text for text in (manifest.name, manifest.revision) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is expected where something else stands")
    for file in files:
        plain = isinstance(file.name, str) and _PLAIN.fullmatch(file.name)
        if not plain or file.name in (".", "..", MANIFEST):
            raise ValueError(f"file name {reprlib.repr(file.name)}")
        if type(file.bytes) is not int or not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise ValueError(f"bytes or hash of {reprlib.repr(file.name)}")
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ValueError("a file is listed twice")
    if manifest.model not in (".", *names):
        raise ValueError(
            f"`model` is {reprlib.repr(manifest.model)}, which is not in the list of files"
        )
    return manifest


def model_in(folder: Path) -> Path:
    """What is to be opened of a folder: the file its manifest names, else the folder itself."""
    manifest = read_manifest(folder)
    return folder if manifest is None else folder / manifest.model


def around(path: Path) -> tuple[Path, Manifest] | None:
    """The folder with a manifest whose model `path` is, as folder or as file."""
    for folder in (path, path.parent):
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest and (folder == path or folder / manifest.model == path):
            return folder, manifest
    return None


def manifest_hash(folder: Path) -> str:
    """The SHA-256 of the manifest: who compares it with the sender's has compared all files."""
    return digests.digest(folder / MANIFEST, "sha256", lambda done: None)


def problem(folder: Path, entry: Entry, step: digests.Step) -> str | None:
    """What is wrong with a file of the folder, None if nothing is. step: told the bytes read."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{size} bytes, expected {entry.bytes}"
        found = digests.digest(path, "sha256", step)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or str(error)
    return None if found == entry.sha256 else f"sha256 is {found}, expected {entry.sha256}"


def strangers(folder: Path, manifest: Manifest) -> list[Path]:
    """What is in the folder and not in its manifest; hidden files do not count."""
    known = {MANIFEST, *(entry.name for entry in manifest.files)}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name not in known and not path.name.startswith(".")
    ]


def write(
    out: Path,
    contents: Mapping[str, Content],
    *,
    model: str,
    quant: str,
    name: str | None,
    revision: str | None,
    replace: bool = False,
    progress: bool | None = None,
) -> Manifest:
    """Make the folder `out` of `contents` (by name) with a manifest.

    It appears whole or not at all. replace: in place of one that is there; else only an empty
    folder may be there. Raises ArgumentError or FileAccessError.
    """
    from importlib.metadata import version

    if not replace and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArgumentError(f"{out}: exists and is not an empty folder, expected a free name")
    with _new_folder(out) as folder:
        files = _copy(contents, folder, f"Writing {out.name}", progress)
        manifest = Manifest(
            model=model,
            quant=quant,
            name=name,
            revision=revision,
            creator=f"qdelta {version('qdelta')}",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            files=tuple(files),
        )
        digests.write(folder / MANIFEST, manifest.to_json().encode(), lambda done: None)
    return manifest


def copy(source: Path, manifest: Manifest, out: Path, progress: bool | None = None) -> None:
    """Make `out` a copy of the folder `source`, in place of one that is there.

    Every file is compared with the manifest while it is copied. Raises FileError if one differs.
    """
    with _new_folder(out) as folder:
        names: dict[str, Content] = {file.name: source / file.name for file in manifest.files}
        copied = _copy(names, folder, f"Copying {source.name}", progress)
        for file, now in zip(manifest.files, copied, strict=True):
            if now != file:
                raise FileError(f"{source / file.name}: changed while it was copied")
        digests.write(folder / MANIFEST, source / MANIFEST, lambda done: None)


def _copy(
    contents: Mapping[str, Content], folder: Path, text: str, progress: bool | None
) -> list[Entry]:
    for name, content in contents.items():
        if callable(content):
            content(folder / name)
    sizes = [_size(folder / n if callable(c) else c) for n, c in contents.items()]
    with step_counter(text, sum(sizes), progress) as step:
        return [
            Entry(name, *_put(content, folder / name, step)) for name, content in contents.items()
        ]


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _put(content: Content, path: Path, step: digests.Step) -> tuple[int, str]:
    if callable(content):  # is there already
        return path.stat().st_size, digests.digest(path, "sha256", step)
    return digests.write(path, content, step)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` at the end of the block, and is gone if it fails."""
    beside = f".{out.name}.{uuid.uuid4().hex[:8]}"
    new, old = out.with_name(f"{beside}.part"), out.with_name(f"{beside}.old.part")
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        raise _access(error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _access(error: OSError) -> FileAccessError:
    if isinstance(error, FileAccessError):
        return error
    return FileAccessError(error.errno, error.strerror, error.filename)


# -------------------------------------------------------------------------------- kept by name


def kept_folder(name: str, cache: Path) -> Path:
    """Where the model called `name` is kept in the cache folder, whether it is there or not."""
    # No name on the hub has two dashes together, or an at sign.
    flat = name.replace(":", "@").replace("/", "--")
    return cache / "kept" / f"models--{flat}"


def kept_names(cache: Path) -> list[str]:
    """The names of all kept models."""
    folder = cache / "kept"
    if not folder.is_dir():
        return []
    return [
        path.name.removeprefix("models--").replace("--", "/").replace("@", ":")
        for path in sorted(folder.iterdir())
        if path.name.startswith("models--") and (path / MANIFEST).is_file()
    ]


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left of a kept model; nobody else may be writing it."""
    own = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}(\.old)?\.part")
    for path in folder.parent.iterdir():
        if own.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def find_kept(name: str, commit: str | None, cache: Path) -> Path | None:
    """What is to be opened of the kept model `name`, None if it is not kept.

    commit: the one it must be of; None: any.
    """
    folder = kept_folder(name, cache)
    manifest = read_manifest(folder)
    if manifest is None or commit not in (None, manifest.revision):
        return None
    return folder / manifest.model


def remove_kept(name: str, cache: Path) -> int:
    """Remove the kept model `name` if there is one. Returns the bytes that were freed."""
    folder = kept_folder(name, cache)
    if not os.path.lexists(folder):
        return 0
    if folder.is_symlink():
        raise FileAccessError(f"{folder}: is a link to another place; remove it yourself")
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    try:
        # Renamed first: a model is either whole or not there.
        gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old.part")
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise _access(error) from error
    return size
