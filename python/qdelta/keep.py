"""Keeping models: fetch, list, remove, carry to another computer.

A model is here in up to three forms: as the hub has it, in the hub's cache (`hub_cache`); *kept*
under its name as a folder that needs nothing else (`archive`), after `pull(only=...)` or an
import; and converted, beside the kept ones in this program's own cache (`weights`), which is made
again whenever it is missing.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import _native, archive, gguf_names, hub, hub_cache, weights
from .errors import ArgumentError, Error, FileAccessError, FileError, UnsupportedError
from .progress import step_counter
from .source import locate

_CONVERTED = ("w4", "w8", "gguf")
_OWN_TYPES = ("qwen3_5", "qwen3_5_text")


# ------------------------------------------------------------------------------------------ pull


def pull(
    name: str,
    *,
    revision: str | None = None,
    only: str | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Fetch a model from the hub, or what is new of it. Returns what `load` opens.

    name: as in `load`, "OWNER/NAME", or "OWNER/NAME:TYPE" for a GGUF file. revision: a branch, a
    tag or a commit; None: the main branch. only: "w4" or "w8" converts the model, keeps the
    result under its name, and removes the original weights from the hub's cache, whoever fetched
    them; "gguf:TYPE" fetches the GGUF file of that type, to be loaded as "NAME:TYPE". None: the
    original, which takes the place of what was kept under its name. cache: folder for converted
    and kept models.

    What was fetched before a call broke off is not fetched again. Raises ArgumentError,
    UnsupportedError, FileError, or FileAccessError.
    """
    if only in ("w4", "w8"):
        return _pull_converted(name, only, revision, cache, progress)
    name = full_name(name, only)
    path = hub.resolve(name, revision=revision, progress=progress, papers=True)
    archive.remove_kept(name, weights.cache_folder(cache))
    return path


def full_name(name: str, only: str | None) -> str:
    """The name under which `pull(name, only=only)` is loaded. Raises ArgumentError."""
    if only in (None, "w4", "w8"):
        return name
    kind, _, wanted = only.partition(":")
    if kind != "gguf" or not wanted or hub.split_name(name)[1] is not None:
        raise ArgumentError(f"only is {only!r}, expected w4, w8 or gguf:TYPE, as gguf:Q4_K_M")
    return f"{name}:{wanted}"


def _pull_converted(
    name: str, quant: str, revision: str | None, cache: str | Path | None, progress: bool | None
) -> Path:
    repo, _ = hub.split_name(name)
    with _place(name, cache) as folder:
        commit = _current_commit(folder, name, quant, revision)
        if commit is None:
            path = hub.resolve(name, revision=revision, progress=progress, papers=True)
            _write(folder, path, quant, name=name, replace=True, cache=cache, progress=progress)
            commit = _snapshot_of(path).name
        model = archive.model_in(folder)
        _native.verify(os.fspath(model))  # proven before anything is removed
        snapshot = hub_cache.snapshot(repo, commit)
        if snapshot is not None:
            hub_cache.remove_files(snapshot, original_weights(name, snapshot))
            for made in converted_from(name, cache):
                _remove_converted(made)
        return model


def _current_commit(folder: Path, name: str, quant: str, revision: str | None) -> str | None:
    """The commit of what is kept in `folder`, if that is what is wanted now."""
    try:
        manifest = archive.read_manifest(folder)
    except FileError:
        return None
    if manifest is None or (manifest.name, manifest.quant) != (name, quant):
        return None
    commit = hub.commit(hub.split_name(name)[0], revision)
    return commit if manifest.revision == commit else None


def original_weights(name: str, snapshot: Path | None = None) -> dict[str, int]:
    """The weights of the model `name` in a snapshot of the hub's cache: path in it -> bytes.

    snapshot: None: that of the main branch.
    """
    repo, wanted = hub.split_name(name)
    snapshot = snapshot or hub_cache.snapshot(repo)
    files = hub_cache.files(snapshot) if snapshot else {}
    if wanted is None:
        names = [n for n in files if any(fnmatch.fnmatch(n, p) for p in hub.WEIGHT_FILES)]
    else:
        try:
            names = list(gguf_names.choose(files, wanted, repo).files)
        except ArgumentError:
            names = []
    return {n: files[n] for n in names}


def _snapshot_of(path: Path) -> Path:
    place = hub_cache.snapshot_of(path)
    if place is None:
        raise FileError(f"{path}: expected a path in the hub's cache")
    return place[1]


@contextmanager
def _place(name: str, cache: str | Path | None) -> Iterator[Path]:
    """The folder for the kept model `name`, while no other process works on it."""
    folder = archive.kept_folder(name, weights.cache_folder(cache))
    with weights.locked(folder):
        archive.clear_leftovers(folder)
        yield folder


# ------------------------------------------------------------------------- to and from folders


def export(
    model: str | Path,
    folder: str | Path,
    *,
    quant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a model with all that belongs to it to a new folder. Returns the folder.

    model, revision, offline, cache: as in `load`. quant: "w4" or "w8" for the converted model;
    None: the weights as they are. `load` takes the folder as a model. The folder appears when it
    is whole. Raises ArgumentError if something is at its place, FileError, FileAccessError or
    UnsupportedError.
    """
    out = Path(os.path.abspath(folder))
    path = locate(model, revision=revision, offline=offline, cache=cache, progress=progress)
    called = None if isinstance(model, Path) or Path(model).exists() else model
    _write(out, path, quant, name=called, replace=False, cache=cache, progress=progress)
    return out


def import_folder(
    folder: str | Path,
    *,
    name: str | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> str:
    """Keep the model in a folder that `export` made, to be loaded by its name without network.

    name: under which to keep it, "OWNER/NAME"; None: the name it had. Every file is compared
    with the manifest first. Returns the name. Raises FileError, naming all files that differ.
    """
    source = Path(os.path.abspath(folder))
    manifest = archive.read_manifest(source)
    if manifest is None:
        raise FileError(f"{source}: no {archive.MANIFEST}, expected a folder made by export")
    name = name or manifest.name
    if name is None:
        raise ArgumentError(f"{source}: comes from no hub, so it has no name; give one")
    _check_name(name)
    with step_counter(f"Verifying {source.name}", manifest.bytes, progress) as step:
        problems = [(f.name, archive.problem(source, f, step)) for f in manifest.files]
    bad = [f"{name}: {problem}" for name, problem in problems if problem]
    if bad:
        what = "; ".join(bad)
        raise FileError(f"{source}: not as its manifest says, nothing was imported: {what}")
    with _place(name, cache) as place:
        archive.copy(source, manifest, place, progress)
    return name


def _check_name(name: str) -> None:
    """Raises ArgumentError for what could be no model's name on the hub."""
    repo, _ = hub.split_name(name)
    if name == "demo" or len(repo) > 96 or re.search(r"--|\.\.|(^|/)[-.]|[-.](/|$)", repo):
        raise ArgumentError(f"{name!r}: cannot be a model's name; expected one as me/my-model")


def _write(
    out: Path,
    path: Path,
    quant: str | None,
    *,
    name: str | None,
    replace: bool,
    cache: str | Path | None,
    progress: bool | None,
) -> None:
    """Write the model at `path` to the folder `out`. name: what it is called, if known."""
    held, hub_place = archive.around(path), hub_cache.snapshot_of(path)
    revision = None
    if held:
        name, revision = held[1].name, held[1].revision
    elif hub_place:
        repo, snapshot = hub_place
        name = name or (repo if path.is_dir() else f"{repo}:{_stem(path, snapshot)}")
        revision = snapshot.name
    contents: dict[str, archive.Content] = {}
    if path.suffix == gguf_names.SUFFIX and quant is None:
        contents, model, now = _gguf_parts(path), path.name, "gguf"
    else:
        checkpoint = _native.Checkpoint(os.fspath(path))
        if quant not in (None, checkpoint.quant):
            now, model = quant, f"model.{quant}.safetensors"
            contents[model] = _converted(checkpoint, path, quant, cache, progress)
        elif path.is_dir():
            now, model = checkpoint.quant, "."
            contents |= {source: path / source for source, _, _ in checkpoint.sources()}
        else:
            now, model = checkpoint.quant, f"model.{checkpoint.quant}.safetensors"
            contents[model] = path
        contents |= _carried(checkpoint)
    root = held[0] if held else hub_place[1] if hub_place else path if path.is_dir() else None
    if root is not None:
        for pattern in (*hub.SMALL_FILES, *hub.PAPERS):
            contents |= {file.name: file for file in root.glob(pattern) if file.is_file()}
    archive.write(
        out, contents, model=model, quant=now, name=name, revision=revision,
        replace=replace, progress=progress,
    )  # fmt: skip


def _converted(
    source: _native.Checkpoint,
    path: Path,
    quant: str,
    cache: str | Path | None,
    progress: bool | None,
) -> archive.Content:
    """The converted file of the cache if there is one, else who makes it."""
    made = weights.converted_path(path, quant, cache)
    if weights.open_if_fresh(made, source) is not None:
        return made
    return lambda out: weights.convert(source, path, out, quant=quant, progress=progress)


def _carried(checkpoint: _native.Checkpoint) -> dict[str, archive.Content]:
    """The small files inside a converted file."""
    found = {name: checkpoint.attachment(name) for name in hub.SMALL_FILES}
    files: dict[str, archive.Content] = {n: c for n, c in found.items() if c is not None}
    if checkpoint.quant != "none":
        files["config.json"] = checkpoint.config_json.encode()
    return files


def _gguf_parts(path: Path) -> dict[str, archive.Content]:
    """All parts of the GGUF file whose first part is `path`."""
    beside = {file.name: file.stat().st_size for file in path.parent.iterdir() if file.is_file()}
    found = [m for m in gguf_names.models(beside) if path.name in m.files]
    if not found:  # by its name no model, but meant
        return {path.name: path}
    if not found[0].whole:
        raise FileError(f"{path}: {len(found[0].files)} of {found[0].parts} parts are here")
    return {name: path.parent / name for name in found[0].files}


def _stem(path: Path, snapshot: Path) -> str:
    relative = path.relative_to(snapshot).as_posix()
    found = gguf_names.models({relative: 0})
    return found[0].stem if found else relative


# ------------------------------------------------------------------------------------------ list


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
    folder = weights.cache_folder(cache)
    found = [_held_kept(name, folder) for name in archive.kept_names(folder)]
    origins: dict[Path, str] = {}
    for repo in hub_cache.repos():
        here = list(_held_in_hub(repo))
        found += here
        for name in {repo, *(one.name for one in here)}:
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
        forms: list[tuple[str, str, list[str], Path, str | None]] = []
        names = list(original_weights(repo, snapshot))
        if any(name.endswith(".safetensors") for name in names) and _is_own(snapshot):
            small = [name for name in hub.SMALL_FILES if name in files]
            forms.append((repo, "none", [*names, *small], snapshot, None))
        ggufs = gguf_names.models(files)
        for label, model in zip(gguf_names.labels(ggufs), ggufs, strict=True):
            path = snapshot / model.files[0]
            parts = f"{len(model.files)} of {model.parts} parts are here"
            problem = None if model.whole else parts
            forms.append((f"{repo}:{label}", model.type, list(model.files), path, problem))
        for name, quant, members, path, problem in forms:
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


def _last_used(paths: Iterator[Path] | list[Path]) -> float:
    times = [path.stat() for path in paths]
    return max((max(time.st_atime, time.st_mtime) for time in times), default=0.0)


# ---------------------------------------------------------------------------------------- remove


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
    found = []
    if not converted:
        folder = weights.cache_folder(cache)
        for one in _kept_as(name, folder):
            place = archive.kept_folder(one, folder)
            found.append(Removal("kept model", place, sum(hub_cache.files(place).values())))
        repo, wanted = hub.split_name(name)
        if wanted is None and os.path.lexists(hub_cache.repo_folder(repo)):
            place = hub_cache.repo_folder(repo)
            found.append(Removal("in the hub's cache", place, _tree_bytes(place)))
        elif wanted is not None:
            for snapshot in hub_cache.snapshots(repo):
                for file, size in original_weights(name, snapshot).items():
                    found.append(Removal("in the hub's cache", snapshot / file, size))
    for path in converted_from(name, cache):
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
    freed = sum(_remove_converted(path) for path in converted_from(name, cache))
    if converted:
        return freed
    for one in _kept_as(name, weights.cache_folder(cache)):
        with _place(one, cache) as place:
            freed += archive.remove_kept(one, weights.cache_folder(cache))
        Path(f"{place}.lock").unlink(missing_ok=True)
    repo, wanted = hub.split_name(name)
    if wanted is not None:
        for snapshot in hub_cache.snapshots(repo):
            freed += hub_cache.remove_files(snapshot, original_weights(name, snapshot))
    elif os.path.lexists(hub_cache.repo_folder(repo)):
        freed += hub_cache.remove_repo(repo)
    return freed


def _kept_as(name: str, cache: Path) -> list[str]:
    """The names of kept models that `name` means: itself, and its GGUF types."""
    names = {*archive.kept_names(cache), name}
    there = [one for one in names if one == name or one.startswith(f"{name}:")]
    return [one for one in sorted(there) if os.path.lexists(archive.kept_folder(one, cache))]


def converted_from(name: str, cache: str | Path | None) -> dict[Path, list[Path]]:
    """Where converted files of a model may be: each with those here that it may be made from.

    name: a name on the hub, or a folder.
    """
    sources: dict[Path, list[Path]] = {}  # a path that stands for all -> themselves
    if Path(name).exists():
        sources[Path(name)] = [Path(name)]
    else:
        repo, wanted = hub.split_name(name)
        here = list(hub_cache.snapshots(repo))
        if not wanted:
            sources[hub_cache.repo_folder(repo) / "snapshots" / "any"] = here
        for snapshot in here:
            ggufs = gguf_names.models(hub_cache.files(snapshot))
            if wanted:
                ggufs = [m for m in ggufs if m.files[0] in original_weights(name, snapshot)]
            for model in ggufs:
                path = snapshot / model.files[0]
                sources[path] = [path]
    return {
        weights.converted_path(path, quant, cache): models
        for path, models in sources.items()
        for quant in _CONVERTED
    }


def _remove_converted(path: Path) -> int:
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
