"""What lies in the hub's cache on this computer, without any network.

The cache has a folder for each repository, `models--OWNER--NAME`, with `refs/BRANCH` that names a
commit, `snapshots/COMMIT/FILE`, links to `blobs/HASH`. The name of a blob is the hub's own hash
of its content, so the cache itself says what its files should be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .errors import FileAccessError

_PREFIX = "models--"
_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")  # git's SHA-1, or SHA-256
_COMMIT = re.compile(r"[0-9a-f]{40}")


def root() -> Path:
    """The cache, as the hub's settings place it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    """Where the repository is kept, whether it is there or not."""
    return root() / (_PREFIX + repo.replace("/", "--"))


def repos() -> Iterator[str]:
    """The names of the models that have a folder in the cache."""
    if root().is_dir():
        for folder in sorted(root().iterdir()):
            if folder.name.startswith(_PREFIX) and (folder / "snapshots").is_dir():
                yield folder.name.removeprefix(_PREFIX).replace("--", "/", 1)


def snapshots(repo: str) -> dict[Path, list[str]]:
    """The snapshots of a repository, and the branches and tags that name each."""
    folder = repo_folder(repo)
    found: dict[Path, list[str]] = {}
    if (folder / "snapshots").is_dir():
        found = {path: [] for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()}
    for ref in sorted((folder / "refs").rglob("*")):
        if ref.is_file():
            place = folder / "snapshots" / _named_by(ref)
            found.get(place, []).append(ref.relative_to(folder / "refs").as_posix())
    return found


def commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag was when it was last looked up; else `revision` itself."""
    refs = repo_folder(repo) / "refs"
    ref = refs / revision
    inside = refs in ref.parents and ".." not in ref.parts
    return _named_by(ref) if inside and ref.is_file() else revision


def snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot of a revision (None: the main branch) if the cache has one, whole or not."""
    name = commit(repo, revision or "main")
    path = repo_folder(repo) / "snapshots" / name
    return path if _COMMIT.fullmatch(name) and path.is_dir() else None


def _named_by(ref: Path) -> str:
    return ref.read_text(encoding="ascii", errors="replace").strip()


def snapshot_of(path: Path) -> tuple[str, Path] | None:
    """The repository and the snapshot that a file or folder of the cache belongs to."""
    absolute = Path(os.path.abspath(path))
    for place in (absolute, *absolute.parents):
        folder = place.parent.parent
        if place.parent.name == "snapshots" and folder.name.startswith(_PREFIX):
            return folder.name.removeprefix(_PREFIX).replace("--", "/", 1), place
    return None


def entries(snapshot: Path) -> dict[str, Path]:
    """All entries of a snapshot by their path in the repository, those without a blob too."""
    found = {}
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(snapshot).as_posix()] = path
    return dict(sorted(found.items()))


def files(snapshot: Path) -> dict[str, int]:
    """The files of a snapshot that are there: path in the repository -> bytes."""
    return {name: path.stat().st_size for name, path in entries(snapshot).items() if path.is_file()}


def known_hash(path: Path) -> str | None:
    """The hash that the hub gave the content of a snapshot's entry.

    None where the cache does not know: file systems without links, other hubs.
    """
    if not path.is_symlink():
        return None
    return as_hash(Path(os.readlink(path)).name)


def as_hash(text: str) -> str | None:
    """The text if it is a hash of the hub."""
    return text if _HASH.fullmatch(text) else None


def remove_repo(repo: str) -> int:
    """Remove a repository from the cache. Returns the bytes that were freed.

    Links are removed, never followed. Raises FileAccessError if something is left.
    """
    folder = repo_folder(repo)
    if folder.is_symlink():
        raise FileAccessError(f"{folder}: is a link to another place; remove it yourself")
    # Downloads that were broken off are in `blobs` as well.
    counted = [path for part in ("blobs", "snapshots") for path in entries(folder / part).values()]
    return _delete(counted, repos=frozenset({folder}))


def remove_files(snapshot: Path, names: Iterable[str]) -> int:
    """Remove files of a snapshot, and their blobs that no other file uses.

    Returns the bytes that were freed. Raises FileAccessError if something is left.
    """
    here = entries(snapshot)
    gone = {here[name] for name in names if name in here}
    used = {
        _blob(path)
        for other in snapshot.parent.iterdir()
        for path in entries(other).values()
        if path not in gone
    }
    own = snapshot.parent.parent / "blobs"
    blobs = {blob for path in gone if (blob := _blob(path)) and blob.parent == own}
    return _delete(gone, links=frozenset(gone), blobs=frozenset(blobs - used))


def _blob(path: Path) -> Path | None:
    """Where the entry of a snapshot leads, None if it is a file itself."""
    if not path.is_symlink():
        return None
    return Path(os.path.normpath(path.parent / os.readlink(path)))


def _delete(
    counted: Iterable[Path],
    repos: frozenset[Path] = frozenset(),
    links: frozenset[Path] = frozenset(),
    blobs: frozenset[Path] = frozenset(),
) -> int:
    """Has the hub's client delete what is given; it knows which blobs models share.

    counted: files to be watched. Returns the bytes of those whose content is gone.
    """
    from huggingface_hub import scan_cache_dir

    sizes = {path.resolve(): path.stat().st_size for path in counted if path.is_file()}
    nothing = scan_cache_dir(root()).delete_revisions()
    try:
        replace(nothing, repos=repos, snapshots=links, blobs=blobs).execute()
    except OSError as error:
        raise FileAccessError(error.errno, error.strerror, error.filename) from error
    left = [path for path in (*repos, *links, *blobs) if os.path.lexists(path)]
    if left:
        raise FileAccessError(f"{left[0]}: could not be removed; is it in use, or another user's?")
    return sum(size for path, size in sizes.items() if not path.exists())
