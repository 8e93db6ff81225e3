"""Which models are on this computer, and their removal.

A model is here in up to three forms: as the hub has it, in the hub's cache (`hub_cache`); *kept*
under its name as a folder that needs nothing else (`archive`); and converted (`weights`), which is
made again whenever it is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import _native, archive, gguf_names, hub, hub_cache, weights
from .cache import cache_folder
from .errors import ArgumentError, Error, FileAccessError, UnsupportedError

_CONVERTED = (*weights.RECIPES, "gguf")
_OWN_TYPES = ("qwen3_5", "qwen3_5_text")


@dataclass(frozen=True, slots=True)
class Held:
    """A model, or a form of it, that is on this computer."""

    name: str  # what `load` takes; of a converted file without a known source, the folder's name
    place: str  # "hub": the hub's cache; "kept"; "converted"; "unfinished": a download
    quant: str  # "none", "w8", "w4", "gguf" or the GGUF type; "?" if it cannot be read
    bytes: int
    last_used: float  # seconds since 1970, as exact as the file system notes it
    revision: str | None  # the commit on the hub
    refs: tuple[str, ...]  # branches and tags that mean it
    path: Path
    problem: str | None  # why it cannot be used as it is


def held(cache: str | Path | None = None) -> list[Held]:
    """All models here that this program can use, and converted files. Opens headers only."""
    folder = cache_folder(cache)
    found = [_held_kept(name, folder) for name in archive.kept_names(folder)]
    origins: dict[Path, str] = {}
    for repo in hub_cache.repos():
        here = list(_held_in_hub(repo))
        found += here
        for name in (repo, *(one.name for one in here)):  # those with a type are more exact
            origins |= dict.fromkeys(converted_from(name, cache), name)
    for path in sorted(folder.glob("*.safetensors")):
        found.append(_held_converted(path, origins.get(path)))
    return found


def _held_kept(name: str, cache: Path) -> Held:
    folder = archive.kept_folder(name, cache)
    try:
        manifest = archive.read_manifest(folder)
        problem = _problem(archive.model_in(folder))
    except Error as error:
        manifest, problem = None, str(error)
    files = hub_cache.files(folder)
    return Held(
        name, "kept", manifest.quant if manifest else "?", sum(files.values()),
        _last_used(folder / file for file in files), manifest.revision if manifest else None, (),
        folder, problem,
    )  # fmt: skip


def _held_in_hub(repo: str) -> Iterator[Held]:
    for snapshot, refs in hub_cache.snapshots(repo).items():
        files = hub_cache.files(snapshot)
        for name, quant, members, path, problem in _forms(repo, snapshot, files):
            with suppress(UnsupportedError):  # another program's
                problem = problem or _problem(path)
                size = sum(files[member] for member in members)
                used = _last_used(snapshot / member for member in members)
                yield Held(
                    name, "hub", quant, size, used, snapshot.name, tuple(refs), path, problem
                )
    for path in sorted((hub_cache.repo_folder(repo) / "blobs").glob("*.incomplete")):
        why = "a download broken off, or under way"
        size = path.stat().st_size
        yield Held(repo, "unfinished", "?", size, _last_used([path]), None, (), path, why)


def _forms(
    repo: str, snapshot: Path, files: Mapping[str, int]
) -> Iterator[tuple[str, str, list[str], Path, str | None]]:
    """The models in a snapshot: name, quant, files, what is to be opened, what is missing."""
    names = [name for name in hub.weights_here(repo, snapshot) if name in files]
    if any(name.endswith(".safetensors") for name in names) and _is_own(snapshot):
        small = [name for name in hub.SMALL_FILES if name in files]
        yield repo, "none", [*names, *small], snapshot, None
    ggufs = gguf_names.models(files)
    for label, model in zip(gguf_names.labels(ggufs), ggufs, strict=True):
        parts = f"{len(model.files)} of {model.parts} parts are here"
        path, problem = snapshot / model.files[0], None if model.whole else parts
        yield f"{repo}:{label}", model.type, list(model.files), path, problem


def _is_own(snapshot: Path) -> bool:
    """Whether config.json says that the model is of the family."""
    try:
        config = json.loads((snapshot / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") in _OWN_TYPES


def _held_converted(path: Path, name: str | None) -> Held:
    try:
        quant, problem = _native.Checkpoint(os.fspath(path)).quant, None
    except Error as error:
        quant, problem = "?", str(error)
    stem = re.sub(r"-[0-9a-f]{16}\.\w+\.safetensors$", "", path.name)
    return Held(
        name or stem, "converted", quant, path.stat().st_size, _last_used([path]), None, (),
        path, problem,
    )  # fmt: skip


def _problem(path: Path) -> str | None:
    """Why the model cannot be opened. Raises UnsupportedError if it is of another kind."""
    try:
        _native.Checkpoint(os.fspath(path))
    except UnsupportedError:
        raise
    except Error as error:
        return str(error)
    return None


def _last_used(paths: Iterable[Path]) -> float:
    times = [path.stat() for path in paths]
    return max((max(time.st_atime, time.st_mtime) for time in times), default=0.0)


@dataclass(frozen=True, slots=True)
class Removal:
    """Something to be removed."""

    what: str
    path: Path
    bytes: int


def removals(
    name: str, *, converted: bool = False, cache: str | Path | None = None
) -> list[Removal]:
    """What `remove` would remove of the model `name`. Sizes in bytes.

    converted: only the converted files of the cache, which any load makes again; then `name` may
    be a folder too. Raises ArgumentError for what can be no name, FileAccessError if nothing is
    here.
    """
    if not converted and Path(name).exists():
        raise ArgumentError(f"{name}: is a path; models are removed by name, this is yours")
    found = []
    if not converted:
        folder = cache_folder(cache)
        for one in kept_as(name, folder):
            place = archive.kept_folder(one, folder)
            found.append(Removal("kept model", place, sum(hub_cache.files(place).values())))
        repo, wanted = hub.split_name(name)
        if wanted is None and os.path.lexists(hub_cache.repo_folder(repo)):
            place = hub_cache.repo_folder(repo)
            found.append(Removal("in the hub's cache", place, _tree_bytes(place)))
        elif wanted is not None:
            for snapshot in hub_cache.snapshots(repo):
                for file, size in hub.weights_here(name, snapshot).items():
                    found.append(Removal("in the hub's cache", snapshot / file, size))
    for path in converted_from(_path_or_name(name), cache):
        if os.path.lexists(path):
            found.append(Removal("converted file", path, path.lstat().st_size))
    if not found:
        raise FileAccessError(f"{name}: nothing of it is here")
    return found


def remove(name: str, *, converted: bool = False, cache: str | Path | None = None) -> int:
    """Remove the model `name` and its converted files. Returns the bytes that were freed.

    converted: only the converted files. Nothing else is removed, and no link is followed. Raises
    as `removals`, and FileAccessError if something is left.
    """
    removals(name, converted=converted, cache=cache)
    freed = sum(remove_converted(path) for path in converted_from(_path_or_name(name), cache))
    if converted:
        return freed
    for one in kept_as(name, cache_folder(cache)):
        with kept_place(one, cache) as place:
            freed += archive.remove_kept(one, cache_folder(cache))
        Path(f"{place}.lock").unlink(missing_ok=True)
    repo, wanted = hub.split_name(name)
    if wanted is not None:
        for snapshot in hub_cache.snapshots(repo):
            freed += hub_cache.remove_files(snapshot, hub.weights_here(name, snapshot))
    elif os.path.lexists(hub_cache.repo_folder(repo)):
        freed += hub_cache.remove_repo(repo)
    return freed


def kept_as(name: str, cache: Path) -> list[str]:
    """The names of kept models that `name` means: itself, and its GGUF types."""
    names = {*archive.kept_names(cache), name}
    there = [one for one in names if one == name or one.startswith(f"{name}:")]
    return [one for one in sorted(there) if os.path.lexists(archive.kept_folder(one, cache))]


def _path_or_name(name: str) -> Path | str:
    return Path(name) if Path(name).exists() else name


def converted_from(model: Path | str, cache: str | Path | None) -> dict[Path, list[Path]]:
    """Where converted files of a model may be: each with those here that it may be made from.

    model: a name on the hub, or the path of a folder or file.
    """
    sources: list[Path] = []
    if isinstance(model, Path):
        sources.append(model)
    else:
        repo, wanted = hub.split_name(model)
        if not wanted:  # should no snapshot be left, the place is found all the same
            sources.append(hub_cache.repo_folder(repo) / "snapshots" / "any")
        for snapshot in hub_cache.snapshots(repo):
            if not wanted:
                sources.append(snapshot)
            ggufs = gguf_names.models(hub_cache.files(snapshot))
            meant = hub.weights_here(model, snapshot) if wanted else None
            firsts = (gguf.files[0] for gguf in ggufs)
            sources += [snapshot / first for first in firsts if meant is None or first in meant]
    places: dict[Path, list[Path]] = {}
    for source in sources:
        for quant in _CONVERTED:
            models = places.setdefault(weights.converted_path(source, quant, cache), [])
            if source.exists():
                models.append(source)
    return places


def remove_converted(path: Path) -> int:
    if not os.path.lexists(path):
        return 0
    size = path.lstat().st_size
    try:
        path.unlink()
        Path(f"{path}.lock").unlink(missing_ok=True)
    except OSError as error:
        raise FileAccessError(error.errno, error.strerror, error.filename) from error
    return size


def _tree_bytes(folder: Path) -> int:
    """Bytes of the content of a repository in the hub's cache, downloads broken off included."""
    files = {path.resolve() for path in hub_cache.entries(folder).values() if path.is_file()}
    return sum(path.stat().st_size for path in files)


@contextmanager
def kept_place(name: str, cache: str | Path | None) -> Iterator[Path]:
    """The folder for the kept model `name`, while no other process works on it."""
    folder = archive.kept_folder(name, cache_folder(cache))
    with weights.locked(folder):
        archive.clear_leftovers(folder)
        yield folder
