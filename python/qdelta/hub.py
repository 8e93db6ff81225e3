"""Models by their name on the Hugging Face Hub.

`huggingface_hub` does the work and its settings apply: the shared cache, HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. Only files that a model needs are fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from . import progress as bars
from .errors import ArgumentError, FileAccessError
from .vocabulary import TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# With the settings of pictures, for when they are read.
SMALL_FILES = (
    "config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_ABSENT = "no such folder, and the hub has no such model, or HF_TOKEN must allow it"
_NO_MODEL = "{!r}: no such file or folder, and no name on the hub (as Qwen/Qwen3.5-0.8B)"


def resolve(
    name: str,
    *,
    offline: bool = False,
    cache: str | Path | None = None,
    progress: bool | None = None,
    tokenizer_only: bool = False,
) -> Path:
    """The local folder of the model `name`, fetched first if need be.

    offline: use what is in the cache, touch no network. cache: is for converted files and is not
    used here; the hub's cache is where its own settings say. progress: show bars; None: on a
    terminal. tokenizer_only: leave the weights out.

    Raises ArgumentError for what can be no name, FileAccessError if the model cannot be had.
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(_NO_MODEL.format(name))
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    offline = offline or constants.HF_HUB_OFFLINE
    were_disabled = are_progress_bars_disabled()
    if not bars.wanted(progress):
        disable_progress_bars()
    try:
        patterns = [*SMALL_FILES, *(() if tokenizer_only else WEIGHT_FILES)]
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except HFValidationError as error:
        raise ArgumentError(f"{_NO_MODEL.format(name)}: {error}") from error
    except Exception as error:
        # The client's HTTP library has exceptions of its own, which change between versions.
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            if offline:
                why = "not whole in the hub's cache, and no network is to be used; fetch it online"
            elif isinstance(cause := error.__cause__, HfHubHTTPError):
                why = _answer(cause)
            else:
                why = (
                    f"the hub at {constants.ENDPOINT} cannot be reached, and its cache here lacks "
                    "the model; check the network, or give the path of a folder"
                )
        elif isinstance(error, GatedRepoError):
            why = "access must be granted on its page first, then set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError):
            why = _ABSENT
        elif isinstance(error, HfHubHTTPError):
            why = _answer(error)
        elif isinstance(error, OSError) and error.strerror:
            why = f"{error.filename or 'the hub cache'}: {error.strerror}"
        else:
            why = f"{type(error).__name__}: {error}"
        raise FileAccessError(f"{name}: {why}") from error
    finally:
        if not were_disabled:
            enable_progress_bars()
    if not (folder / "config.json").exists():
        why = "it has no config.json, so it is no checkpoint in Hugging Face form"
        if offline:
            why = "its config.json is not in the hub's cache; fetch it online"
        raise FileAccessError(f"{name}: {why}")
    return folder


def _answer(error: HfHubHTTPError) -> str:
    """What the hub said, on one line."""
    status = error.response.status_code if error.response is not None else "an error"
    said = getattr(error, "server_message", None) or str(error).split("(Request ID")[0]
    if status == 401:  # to strangers, absent and private models look the same
        return _ABSENT
    if status == 403:
        return "the hub refuses access (403); set HF_TOKEN to a token that allows it"
    return f"the hub answered {status}: {' '.join(said.split())}"
