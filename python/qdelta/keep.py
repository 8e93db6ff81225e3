"""Keeping models: fetch them, and carry them to another computer as folders.

What `pull` fetches lies in the hub's cache, as for any program of the hub. With a recipe for
`only`, and after an import, a model is *kept* under its name as a folder that needs nothing else
(`archive`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import _native, archive, gguf_names, hub, hub_cache, inventory, weights
from .cache import cache_folder
from .errors import ArgumentError, Error, FileError
from .progress import step_counter
from .source import locate


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
    tag or a commit; None: the main branch. only: a recipe, as "balanced", converts the model, keeps
    the result under its name, and removes the original weights from the hub's cache, whoever
    fetched them; "gguf:TYPE" fetches the GGUF file of that type, to be loaded as "NAME:TYPE".
    None: the original, which takes the place of what was kept under its name. cache: folder for
    converted and kept models.

    What was fetched before a call broke off is not fetched again. Raises ArgumentError,
    UnsupportedError, FileError, or FileAccessError.
    """
    if only in weights.RECIPES:
        return _pull_converted(name, only, revision, cache, progress)
    name = full_name(name, only)
    path = hub.resolve(name, revision=revision, progress=progress, papers=True)
    archive.remove_kept(name, cache_folder(cache))
    return path


def full_name(name: str, only: str | None) -> str:
    """The name under which `pull(name, only=only)` is loaded. Raises ArgumentError."""
    if only in (None, *weights.RECIPES):
        return name
    kind, _, wanted = only.partition(":")
    if kind == "gguf" and wanted and hub.split_name(name)[1] is not None:
        raise ArgumentError(f"{name}: names a GGUF file already; give it without only={only!r}")
    if kind != "gguf" or not wanted:
        names = ", ".join(weights.RECIPES)
        raise ArgumentError(f"only is {only!r}, expected {names} or gguf:TYPE, as gguf:Q4_K_M")
    return f"{name}:{wanted}"


def _pull_converted(
    name: str, quant: str, revision: str | None, cache: str | Path | None, progress: bool | None
) -> Path:
    repo, _ = hub.split_name(name)
    with inventory.kept_place(name, cache) as folder:
        commit = _current_commit(folder, name, quant, revision)
        if commit is None:
            path = hub.resolve(name, revision=revision, progress=progress, papers=True)
            _write(
                folder, path, _native.Checkpoint(os.fspath(path)), quant,
                name=name, replace=True, cache=cache, progress=progress,
            )  # fmt: skip
            commit = _snapshot_of(path).name
            _native.verify(os.fspath(archive.model_in(folder)))  # before anything is removed
        snapshot = hub_cache.snapshot(repo, commit)
        if snapshot is not None:
            hub_cache.remove_files(snapshot, hub.weights_here(name, snapshot))
            for made in inventory.converted_from(name, cache):
                inventory.remove_converted(made)
        return archive.model_in(folder)


def _current_commit(folder: Path, name: str, quant: str, revision: str | None) -> str | None:
    """The commit of what is kept in `folder`, if that is whole and what is wanted now."""
    try:
        manifest = archive.read_manifest(folder)
        if manifest is None or (manifest.name, manifest.quant) != (name, quant):
            return None
        _native.verify(os.fspath(folder / manifest.model))
    except Error:
        return None  # damaged: it is made again
    commit = hub.commit(hub.split_name(name)[0], revision)
    return commit if manifest.revision == commit else None


def _snapshot_of(path: Path) -> Path:
    place = hub_cache.snapshot_of(path)
    if place is None:
        raise FileError(f"{path}: expected a path in the hub's cache")
    return place[1]


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

    model, revision, offline, cache: as in `load`. quant: a recipe for the converted model;
    None: the weights as they are. `load` takes the folder as a model. The folder appears when it
    is whole. Raises ArgumentError if something is at its place, FileError, FileAccessError or
    UnsupportedError.
    """
    out = Path(os.path.abspath(folder))
    path = locate(model, revision=revision, offline=offline, cache=cache, progress=progress)
    called = None if isinstance(model, Path) or Path(model).exists() else model
    _write(
        out, path, weights.open_checkpoint(path), quant,
        name=called, replace=False, cache=cache, progress=progress,
    )  # fmt: skip
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
        raise ArgumentError(
            f"{source}: comes from no hub, so it has no name; give one with name= (--as)"
        )
    _check_name(name)
    with step_counter(f"Verifying {source.name}", manifest.bytes, progress) as step:
        problems = [(f.name, archive.problem(source, f, step)) for f in manifest.files]
    bad = [f"{file}: {problem}" for file, problem in problems if problem]
    if bad:
        what = "; ".join(bad)
        raise FileError(f"{source}: not as its manifest says, nothing was imported: {what}")
    with inventory.kept_place(name, cache) as place:
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
    checkpoint: _native.Checkpoint,
    quant: str | None,
    *,
    name: str | None,
    replace: bool,
    cache: str | Path | None,
    progress: bool | None,
) -> None:
    """Write the model `checkpoint`, which was opened from `path`, to the folder `out`.

    name: what it is called, if known.
    """
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
