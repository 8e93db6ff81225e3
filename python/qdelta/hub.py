"""Models by their name on the Hugging Face Hub.

`huggingface_hub` does the work and its settings apply: the shared cache, HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. Only files that a model needs are fetched. `OWNER/NAME` is a checkpoint
of safetensors files, `OWNER/NAME:TYPE` a GGUF file of a repository that holds several.
"""

from __future__ import annotations

import fnmatch
import glob
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import _native, gguf_names, hub_cache
from . import progress as bars
from .errors import ArgumentError, Error, FileAccessError, FileError
from .vocabulary import TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

# With the settings of pictures, for when they are read.
SMALL_FILES = (
    "config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
# What belongs to a copy that is kept, though no program reads it.
PAPERS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")

# The header of a released file has 6 to 12 MiB, most of it the vocabulary. It is read in steps that
# double what is there.
_FIRST_STEP = 1 << 20
_MOST_HEADER = 256 << 20

_NAME = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w./-]+))?", re.ASCII)
_ABSENT = "no such folder, and the hub has no such model, or HF_TOKEN must allow it"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository as the hub states it."""

    bytes: int
    hash: str  # hexadecimal: SHA-256 of a large file, git's SHA-1 of a small one


def split_name(name: str) -> tuple[str, str | None]:
    """The repository, and the GGUF type or file after a colon. Raises ArgumentError."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ArgumentError(_no_model(name))
    return match[1], match[2]


def _on_hub(name: str) -> tuple[str, str | None]:
    """The same of what is to be fetched: models of the family have an owner."""
    repo, wanted = split_name(name)
    if "/" not in repo:
        raise ArgumentError(_no_model(name))
    return repo, wanted


def _no_model(name: str) -> str:
    here = name == "demo" or Path(name).exists()
    why = "is on this computer" if here else "no such file or folder"
    return f"{name!r}: {why}, and no name on the hub (as Qwen/Qwen3.5-0.8B)"


def resolve(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: bool | None = None,
    tokenizer_only: bool = False,
    papers: bool = False,
) -> Path:
    """The local folder of the model `name`, or its first GGUF file, fetched first if need be.

    revision: a branch, a tag or a commit; None: the main branch. offline: use what is in the
    hub's cache, touch no network. progress: show bars; None: on a terminal. tokenizer_only: leave
    the weights of a checkpoint out. papers: fetch README and licence too.

    Raises ArgumentError for what can be no name, and for a GGUF type that is missing or unclear;
    FileAccessError if the model cannot be had.
    """
    repo, wanted = _on_hub(name)
    offline = offline or _never_online()
    extras = PAPERS if papers else ()
    if wanted is not None:
        model = _choose_gguf(repo, wanted, _gguf_files(repo, revision, offline))
        patterns = [*map(glob.escape, model.files), *extras]
        folder = _fetch(repo, patterns, revision, offline, progress)
        return folder / model.files[0]
    if offline:
        _refuse_gguf_only(repo, revision, offline)
    weights = () if tokenizer_only else WEIGHT_FILES
    folder = _fetch(repo, [*SMALL_FILES, *weights, *extras], revision, offline, progress)
    has_config = (folder / "config.json").exists()
    has_weights = tokenizer_only or any(folder.glob(WEIGHT_FILES[0]))
    if not (has_config and has_weights):
        _refuse_gguf_only(repo, revision, offline)
    if not has_config:
        why = "it has no config.json, so it is no checkpoint in Hugging Face form"
        if offline:
            why = "its config.json is not in the hub's cache; fetch it online"
        raise FileAccessError(f"{name}: {why}")
    return folder


def resolve_header(
    name: str, folder: Path, *, revision: str | None = None, offline: bool = False
) -> Path:
    """The first GGUF file of `name`, an `OWNER/NAME:TYPE`, of which the header is wanted.

    It is that of the hub's cache if all parts are there. Else each part gets a file in `folder`,
    as long as the hub's, with the header alone; a hole that takes no room, where the file system
    has holes, stands for the weights. Raises as `resolve`, and FileError for a damaged header.
    """
    repo, wanted = _on_hub(name)
    assert wanted is not None
    listed = _gguf_files(repo, revision, offline or _never_online())
    model = _choose_gguf(repo, wanted, listed)
    snapshot = hub_cache.snapshot(repo, revision)
    here = _listed_here(snapshot) if snapshot else {}
    if all(_same(here.get(path), listed[path]) for path in model.files):
        return resolve(name, revision=revision, offline=offline, progress=False)
    for path in model.files:
        _fetch_header(repo, path, listed[path].bytes, revision, folder / Path(path).name)
    return folder / Path(model.files[0]).name


def commit(repo: str, revision: str | None = None) -> str:
    """The commit that `revision` of `repo` is now: the hub's word, or offline the cache's."""
    if _never_online():
        snapshot = hub_cache.snapshot(repo, revision)
        if snapshot is None:
            raise FileAccessError(f"{repo}: not in the hub's cache, and no network is to be used")
        return snapshot.name
    from huggingface_hub import HfApi

    with _hub_errors(repo, revision):
        return HfApi().model_info(repo, revision=revision).sha or ""


def files(repo: str, revision: str | None = None) -> dict[str, HubFile]:
    """The files of a repository by path, as the hub has them. Raises FileAccessError."""
    from huggingface_hub import HfApi

    with _hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    return {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")
        for file in info.siblings or ()
    }


def weights_here(name: str, snapshot: Path | None = None) -> dict[str, int]:
    """The weights of the model `name` in a snapshot of the hub's cache: path in it -> bytes.

    snapshot: None: that of the main branch. A file whose content is missing has 0 bytes.
    """
    repo, wanted = split_name(name)
    snapshot = snapshot or hub_cache.snapshot(repo)
    there: dict[str, int] = {}
    if snapshot is not None:
        there = dict.fromkeys(hub_cache.entries(snapshot), 0) | hub_cache.files(snapshot)
    if wanted is None:
        names = [n for n in there if any(fnmatch.fnmatch(n, p) for p in WEIGHT_FILES)]
    else:
        try:
            names = list(gguf_names.find(there, wanted, repo).files)
        except ArgumentError:
            names = []
    return {n: there[n] for n in names}


def _gguf_files(repo: str, revision: str | None, offline: bool) -> dict[str, HubFile]:
    """All files by path, as the hub lists them, or else as the cache here has them."""
    snapshot = hub_cache.snapshot(repo, revision)
    here = _listed_here(snapshot) if snapshot else {}
    if offline and not here:
        raise FileAccessError(f"{repo}: not in the hub's cache, and no network is to be used")
    if offline:
        return here
    try:
        return files(repo, revision)
    except FileAccessError:
        if gguf_names.models(_sizes(here)):
            return here  # the network is not missed
        raise


def _listed_here(snapshot: Path) -> dict[str, HubFile]:
    """The files of a snapshot that are there; a hash that the cache does not know is empty."""
    sizes = hub_cache.files(snapshot)
    return {
        path: HubFile(size, hub_cache.known_hash(snapshot / path) or "")
        for path, size in sizes.items()
    }


def _same(here: HubFile | None, listed: HubFile) -> bool:
    """Whether a file of the cache is the hub's, as far as both know."""
    return here is not None and here.bytes == listed.bytes and here.hash in ("", listed.hash)


def _sizes(listed: dict[str, HubFile]) -> dict[str, int]:
    return {path: file.bytes for path, file in listed.items()}


def _choose_gguf(repo: str, wanted: str, listed: dict[str, HubFile]) -> gguf_names.GgufModel:
    return gguf_names.choose(_sizes(listed), wanted, repo)


def _fetch_header(repo: str, path: str, size: int, revision: str | None, out: Path) -> None:
    """Make the file `out` of `size` bytes with the header of a GGUF file of the hub."""
    from huggingface_hub import HfFileSystem

    # A new one, for old ones remember what the hub listed.
    system = HfFileSystem(skip_instance_cache=True)
    with (
        _hub_errors(repo, revision),
        system.open(f"{repo}/{path}", revision=revision, cache_type="none") as remote,
        out.open("wb") as local,
    ):
        done = 0
        while done < size and (not done or _native.gguf_header_bytes(str(out), size) is None):
            if done >= _MOST_HEADER:
                raise FileError(f"{path}: a header of more than {_MOST_HEADER >> 20} MiB")
            step = min(max(done, _FIRST_STEP), size - done)
            content = remote.read(step)
            if len(content) != step:
                raise FileAccessError(
                    f"{repo}: the hub sent {len(content)} bytes of {path}, asked were {step}"
                )
            local.write(content)
            local.flush()
            done += step
        local.truncate(size)


def _refuse_gguf_only(repo: str, revision: str | None, offline: bool) -> None:
    """Raises ArgumentError if the repository has GGUF files and no others."""
    snapshot = hub_cache.snapshot(repo, revision)
    paths = hub_cache.files(snapshot) if snapshot else {}
    if not offline:
        paths = _sizes(_gguf_files(repo, revision, offline))
    there = gguf_names.models(paths)
    if there and not any(path.endswith(".safetensors") for path in paths):
        raise ArgumentError(f"{repo}: holds GGUF files; {gguf_names.listing(repo, there)}")


def _fetch(
    repo: str, patterns: list[str], revision: str | None, offline: bool, progress: bool | None
) -> Path:
    """The folder with the files of `repo` that match `patterns`."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, revision, offline), _bars(progress):
        folder = _apart(
            lambda: snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    return Path(folder)


def _apart(work: Callable[[], T]) -> T:
    """The result of `work`, which a thread of its own does, so that Ctrl-C ends the wait at once.

    The client has threads, too, for whose files it waits when it is interrupted.
    """
    from concurrent.futures import Future, wait

    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="qdelta-fetch", daemon=True).start()
    while not result.done():
        wait([result], timeout=0.2)  # without an end, Windows would not let Ctrl-C through
    return result.result()


def _never_online() -> bool:
    """Whether the hub's own setting forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _bars(progress: bool | None) -> Iterator[None]:
    """Shows the client's bars only if they are wanted."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    if not bars.wanted(progress):
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


@contextmanager
def _hub_errors(repo: str, revision: str | None = None, offline: bool = False) -> Iterator[None]:
    """Turns the client's exceptions into errors that say what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable = (
        f"no such folder, the hub at {constants.ENDPOINT} cannot be reached, and its cache here "
        "lacks the model; check the name and the network"
    )
    try:
        yield
    except Error:
        raise
    except HFValidationError as error:
        raise ArgumentError(f"{_no_model(repo)}: {error}") from error
    except Exception as error:
        # The client's HTTP library has exceptions of its own, which change between versions.
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            if offline:
                why = "not whole in the hub's cache, and no network is to be used; fetch it online"
            elif isinstance(cause := error.__cause__, HfHubHTTPError):
                why = _answer(cause)
            else:
                why = unreachable
        elif isinstance(error, GatedRepoError):
            why = "access must be granted on its page first, then set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError):
            why = _ABSENT
        elif isinstance(error, RevisionNotFoundError):
            why = f"the hub has no revision {revision!r} of it"
        elif isinstance(error, HfHubHTTPError):
            why = _answer(error)
        elif type(error).__name__ in ("ConnectError", "ConnectionError", "ConnectTimeout"):
            why = unreachable
        elif isinstance(error, OSError) and error.strerror:
            why = f"{error.filename or 'the hub cache'}: {error.strerror}"
        else:
            why = f"{type(error).__name__}: {error}"
        raise FileAccessError(f"{repo}: {why}") from error


def _answer(error: HfHubHTTPError) -> str:
    """What the hub said, on one line."""
    status = error.response.status_code if error.response is not None else "an error"
    said = getattr(error, "server_message", None) or str(error).split("(Request ID")[0]
    if status == 401:  # to strangers, absent and private models look the same
        return _ABSENT
    if status == 403:
        return "the hub refuses access (403); set HF_TOKEN to a token that allows it"
    return f"the hub answered {status}: {' '.join(said.split())[:300]}"
