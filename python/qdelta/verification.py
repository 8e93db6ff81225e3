"""Is what lies here what it should be? Hashes of models, compared with what is known of them.

Files of the hub's cache are compared with the hashes by which the hub itself names them: SHA-256
of large files, git's SHA-1 of small ones. Converted files carry a hash of their data and a list of
what they were made from; folders that `export` made, and kept models, have a manifest.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import _native, archive, digests, gguf_names, hub, hub_cache, inventory
from .cache import cache_folder
from .errors import ArgumentError, Error, FileAccessError
from .progress import step_counter


@dataclass(frozen=True, slots=True)
class FileCheck:
    """A file that was verified."""

    path: Path
    against: str  # what it was compared with
    problem: str | None  # what is wrong with it, None if nothing is


@dataclass(frozen=True, slots=True)
class Verification:
    """All files of a model that were verified."""

    files: tuple[FileCheck, ...]

    @property
    def bad(self) -> tuple[FileCheck, ...]:
        return tuple(file for file in self.files if file.problem is not None)

    @property
    def ok(self) -> bool:
        return not self.bad


@dataclass(frozen=True, slots=True)
class _Task:
    """A file to be verified."""

    path: Path
    against: str
    bytes: int  # that will be read
    problem: Callable[[digests.Step], str | None]  # verifies it


def verify(
    model: str | Path,
    *,
    revision: str | None = None,
    online: bool = False,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Verification:
    """Read a model whole and compare every file with the hash that is known of it.

    model: a name: all that is here of it, in the hub's cache (revision: of this only; None: of
    all), kept, and converted; or a converted file, a folder that `export` made, a folder that the
    hub's client downloaded to. online: ask the hub for the hashes instead of believing the names
    in its cache. cache: folder of converted and kept models.

    A file that differs is no exception but a `problem` in the result. Raises FileAccessError if
    nothing of the model is here, ArgumentError for what carries no hash.
    """
    path = Path(model)
    if not str(model):
        raise ArgumentError("model: empty; expected a name on the hub, a folder, or a file")
    if isinstance(model, Path) or path.exists():
        tasks = _of_path(path, online)
    else:
        tasks = list(_of_name(str(model), revision, online, cache))
        if not tasks:
            raise FileAccessError(f"{model}: nothing of it is here; fetch it with `qdelta pull`")
    with step_counter("Verifying", sum(task.bytes for task in tasks), progress) as step:
        return Verification(tuple(FileCheck(t.path, t.against, t.problem(step)) for t in tasks))


def _of_name(
    name: str, revision: str | None, online: bool, cache: str | Path | None
) -> Iterator[_Task]:
    """All that is here of the model `name`."""
    repo, wanted = hub.split_name(name)
    folder = cache_folder(cache)
    for one in inventory.kept_as(name, folder) if revision is None else ():
        kept = archive.kept_folder(one, folder)
        if manifest := archive.read_manifest(kept):
            yield from _of_manifest(kept, manifest)
    only = None if revision is None else hub_cache.snapshot(repo, revision)
    for snapshot in hub_cache.snapshots(repo):
        if revision is None or snapshot == only:
            some = hub.weights_here(name, snapshot) if wanted else None
            hashes = hub.files(repo, snapshot.name) if online else None
            yield from _of_snapshot(snapshot, hashes, some)
    if revision is None:
        yield from _of_converted(name, cache)


def _of_snapshot(
    snapshot: Path, hashes: Mapping[str, hub.HubFile] | None, some: Container[str] | None
) -> Iterator[_Task]:
    """The files of a snapshot. hashes: the hub's, None for the cache's own. some: only these."""
    against = "the hub's cache" if hashes is None else "the hub"
    for name, path in hub_cache.entries(snapshot).items():
        if some is not None and name not in some:
            continue
        if hashes is None:
            expected = hub_cache.known_hash(path)
            unknown = "the cache does not know its hash; ask the hub, online"
        else:
            expected = hashes[name].hash if name in hashes else None
            unknown = "the hub has no such file"
        yield _task(path, against, expected, unknown)
    if some is None:
        yield from _missing_shards(snapshot)
    for model in gguf_names.models(dict.fromkeys(hub_cache.entries(snapshot), 0)):
        if not model.whole and (some is None or model.files[0] in some):
            problem = f"{len(model.files)} of {model.parts} parts are here"
            yield _fault(snapshot / model.files[0], "its name", problem)


def _task(path: Path, against: str, expected: str | None, unknown: str) -> _Task:
    """A file that should have the hash `expected`. unknown: why there may be none."""
    if not path.is_file():
        return _fault(path, against, "missing")
    if not expected:
        return _fault(path, against, unknown)

    def problem(step: digests.Step) -> str | None:
        kind = digests.kind_of(expected)
        try:
            found = digests.digest(path, kind, step)
        except OSError as error:
            return error.strerror or str(error)
        return None if found == expected else f"{kind} is {found}, expected {expected}"

    return _Task(path, against, path.stat().st_size, problem)


def _fault(path: Path, against: str, problem: str) -> _Task:
    """What is known without reading it."""
    return _Task(path, against, 0, lambda step: problem)


def _missing_shards(snapshot: Path) -> Iterator[_Task]:
    """What the index of a model names and is not there, or the index itself."""
    index = snapshot / "model.safetensors.index.json"
    shards = fnmatch.filter(hub_cache.entries(snapshot), "model*-of-*.safetensors")
    if shards and not os.path.lexists(index):
        yield _fault(index, shards[0], "missing")
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
            if not os.path.lexists(snapshot / shard):
                yield _fault(snapshot / shard, index.name, "missing")


def _of_converted(name: str, cache: str | Path | None) -> Iterator[_Task]:
    """The converted files of the cache, which must be of what is in the hub's cache now."""
    for path, sources in inventory.converted_from(name, cache).items():
        if path.is_file():
            made_from = _sources(path)
            if sources and made_from and made_from not in map(_sources, sources):
                problem = "made from other files than those here; the next load makes it again"
                yield _fault(path, "its sources", problem)
            else:
                yield _own_hash(path)


def _sources(path: Path) -> list[tuple[str, int, int]]:
    """What a converted file was made from, or a checkpoint consists of; empty if not readable."""
    try:
        return _native.Checkpoint(os.fspath(path)).sources()
    except Error:
        return []


def _own_hash(path: Path) -> _Task:
    """A converted file."""
    size = path.stat().st_size

    def problem(step: digests.Step) -> str | None:
        try:
            _native.verify(os.fspath(path))
        except Error as error:
            return str(error)
        finally:
            step(size)
        return None

    return _Task(path, "its own hash", size, problem)


def _of_manifest(folder: Path, manifest: archive.Manifest) -> Iterator[_Task]:
    against = "its manifest"
    for entry in manifest.files:
        check = functools.partial(archive.problem, folder, entry)
        yield _Task(folder / entry.name, against, entry.bytes, check)
    for path in archive.strangers(folder, manifest):
        yield _fault(path, against, "is not in the manifest")


def _of_path(path: Path, online: bool) -> list[_Task]:
    """A file or folder."""
    if not path.exists():
        raise FileAccessError(f"{path}: no such file or folder")
    if path.is_dir() and (manifest := archive.read_manifest(path)):
        return list(_of_manifest(path, manifest))
    place = hub_cache.snapshot_of(path)
    if place is not None:
        repo, snapshot = place
        hashes = hub.files(repo, snapshot.name) if online else None
        inside = Path(os.path.abspath(path)).relative_to(snapshot).as_posix()
        return list(_of_snapshot(snapshot, hashes, None if path.is_dir() else {inside}))
    if path.is_dir() and (tasks := list(_of_download(path))):
        return tasks
    if path.is_file() and path.suffix == ".safetensors":
        return [_own_hash(path)]
    raise ArgumentError(
        f"{path}: nothing says what its hashes should be; expected a converted file, a folder "
        "that `qdelta export` made, or what the hub's client downloaded"
    )


def _of_download(folder: Path) -> Iterator[_Task]:
    """A folder that the hub's client downloaded to; it keeps hashes in a hidden folder there."""
    notes = folder / ".cache" / "huggingface" / "download"
    for name, note in hub_cache.entries(notes).items():
        if name.endswith(".metadata"):
            lines = note.read_text(encoding="ascii", errors="replace").splitlines()
            expected = hub_cache.as_hash(lines[1]) if len(lines) > 1 else None
            path = folder / name.removesuffix(".metadata")
            yield _task(path, "the hub's download notes", expected, "its hash was not noted")
