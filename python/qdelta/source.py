"""Where a model's files are: a folder, a GGUF or converted file, the package itself, the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from . import gguf, hub, hub_cache
from .cache import cache_folder
from .errors import ArgumentError, FileError
from .vocabulary import TOKENIZER_FILES, read_folder

if TYPE_CHECKING:
    from . import _native


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """The folder or file that `source` names, fetched from the hub if need be.

    A folder that `qdelta export` made means the model in it. revision: of a name on the hub.
    Raises ArgumentError and FileAccessError for names that lead nowhere.
    """
    path = _on_this_computer(source, revision, cache)
    if path is None:
        path = hub.resolve(str(source), revision=revision, offline=offline, progress=progress)
    return path


@contextmanager
def located_header(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache: str | Path | None = None,
    progress: bool | None = None,
    weights: bool = False,
) -> Iterator[Path]:
    """The same for the time of the block, where weights need not be there to be read.

    Of a name on the hub these are the small files of a checkpoint, or the header of a GGUF file.
    weights: fetch those of a checkpoint too, for its headers.
    """
    path = _on_this_computer(source, revision, cache)
    if path is not None:
        yield path
        return
    name = str(source)
    if hub.split_name(name)[1] is None:
        yield hub.resolve(
            name,
            revision=revision,
            offline=offline,
            progress=progress,
            tokenizer_only=not weights,
        )
        return
    with TemporaryDirectory(prefix="qdelta-", ignore_cleanup_errors=True) as folder:
        yield hub.resolve_header(name, Path(folder), revision=revision, offline=offline)


def _on_this_computer(
    source: str | Path, revision: str | None, cache: str | Path | None
) -> Path | None:
    """The folder or file that `source` names, None if it is a name on the hub and not kept."""
    if not str(source):
        # An empty path would be the current folder, which nobody means by it.
        raise ArgumentError("model: empty; expected a name on the hub, a folder, or a file")
    path = Path(source)
    is_file = path.suffix in (".safetensors", ".gguf")
    is_name = not (isinstance(source, Path) or is_file or path.exists())
    if revision is not None and (not is_name or source == "demo"):
        raise ArgumentError(f"{source}: revision is for names on the hub")
    if str(source) == "demo":
        from . import demo

        return demo.path()
    from . import archive

    if isinstance(source, Path) or not is_name:
        return archive.model_in(path)  # opening it tells what is wrong, if it is not there
    commit = None if revision is None else hub_cache.commit(hub.split_name(source)[0], revision)
    return archive.find_kept(source, commit, cache_folder(cache))


def tokenizer_files(path: Path, checkpoint: _native.Checkpoint | None = None) -> dict[str, bytes]:
    """Contents by name of the tokenizer files in a folder, or inside a GGUF or converted file.

    checkpoint: the file, if it is open already. Raises FileError if there are none.
    """
    if path.is_dir():
        return read_folder(path)
    if checkpoint is None:
        from . import _native

        checkpoint = _native.Checkpoint(str(path))
    if checkpoint.quant == "none" and checkpoint.convention == "gguf":
        return gguf.tokenizer_files(checkpoint.gguf_value, path.name)
    found = {name: checkpoint.attachment(name) for name in TOKENIZER_FILES}
    files = {name: content for name, content in found.items() if content is not None}
    if not files:
        raise FileError(f"{path}: carries no tokenizer files; use the folder it came from")
    return files
