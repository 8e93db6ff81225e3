"""Models by their name on the Hugging Face Hub.

`huggingface_hub` does the work and its settings apply: the shared cache, HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. Only files that a model needs are fetched.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import progress as bars
from .errors import ArgumentError, Error, FileAccessError

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


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
        raise ArgumentError(
            f"{name!r}: no such file or folder, and no name on the hub (as Qwen/Qwen3.5-0.8B)"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    offline = offline or constants.HF_HUB_OFFLINE
    were_disabled = are_progress_bars_disabled()
    if not bars.wanted(progress):
        disable_progress_bars()
    try:
        patterns = [*TOKENIZER_FILES, *(() if tokenizer_only else WEIGHT_FILES)]
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except GatedRepoError as error:
        raise _failed(name, "access must be granted on its page first, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise _failed(name, "the hub has no such model, or it is private and HF_TOKEN is not set") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            raise _failed(
                name, "it is not in the hub's cache, and offline work was asked for; fetch it once online"
            ) from error
        raise _failed(name, "the hub cannot be reached, and its cache here does not have it") from error
    except HfHubHTTPError as error:
        raise _failed(name, str(error)) from error
    except OSError as error:
        raise _failed(name, error.strerror or str(error)) from error
    except Error:
        raise
    except Exception as error:
        # The client's HTTP library has exceptions of its own, which change between versions.
        raise _failed(name, f"{type(error).__name__}: {error}") from error
    finally:
        if not were_disabled:
            enable_progress_bars()
    if not (folder / "config.json").exists():
        raise _failed(name, "it has no config.json" if not offline else "its config.json is not in the cache")
    return folder


def _failed(name: str, why: str) -> FileAccessError:
    return FileAccessError(f"{name}: {why}")
