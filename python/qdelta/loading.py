"""`load`: from a name to a model ready to answer."""

from __future__ import annotations

import json
import numbers
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _native, weights
from .errors import ArgumentError
from .memory import parse_bytes
from .source import locate, tokenizer_files
from .synonyms import canonical
from .tokenizer import Tokenizer
from .vocabulary import parse_json

if TYPE_CHECKING:
    from .llm import Model

_SYNONYMS = {
    "context": "ctx",
    "n_ctx": "ctx",
    "context_length": "ctx",
    "max_model_len": "ctx",
    "n_threads": "threads",
    "kv_cache": "kv",
    "cache_dir": "cache",
    "local_files_only": "offline",
    "quantization": "quant",
}
_NAMES = frozenset(
    {"quant", "ctx", "yarn", "threads", "kv", "isa", "head", "cache", "offline", "progress"}
    | {"revision", "memory_limit"}
)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    quant: str = "auto",
    ctx: int | None = None,
    yarn: float | None = None,
    threads: int | None = None,
    kv: str = "auto",
    isa: str | None = None,
    head: str = "full",
    memory_limit: int | str | None = None,
    cache: str | Path | Literal[False] | None = None,
    offline: bool = False,
    progress: bool | None = None,
    **synonyms: Any,
) -> Model:
    """Load a model.

    model: a name on the hub, a checkpoint folder, a GGUF file, a converted file, or "demo", the
    toy that travels with the package; a folder that `export` made means the model in it.
    revision: a branch, a tag or a commit of a name on the hub; None: the main branch.
    quant: the recipe by which the model is converted once, the result being kept: "balanced"
    (about 5 bits a weight), "small", "fine", "best", or plain "w4" and "w8"; "none" computes with
    the file's own weights where they lie. A quantised GGUF file keeps its numbers: "gguf" puts them
    once into the order that is fastest to read, "none" makes no copy and is slower. "auto" is what
    a converted file already is, "none" for toys, "gguf" for quantised GGUF files, else "balanced".
    ctx: tokens that a session can hold; None: as many as the model was made for. Memory is
    taken as it fills.
    yarn: factor by which YaRN extends the context, as 4.0 for a million tokens of a 4B or 9B; it
    may harm short texts. None: what config.json says, which is no extension in released models;
    1: none in any case.
    threads: 1 to 1024; None: one for each physical core that this process may use, by its
    affinity mask and its quota of CPU time (a container's limit, rounded down), and no more than
    OMP_NUM_THREADS says. The answers do not depend on it.
    kv: KV cache as "f32", "f16" or "q8", signed bytes, which take half the memory of f16 and are
    faster with long contexts; "auto": "f32" with quant="none", else "f16". isa: an instruction
    set of `qdelta.instruction_sets()`; None: the best.
    head: "full" chooses tokens from all logits. "screened" finds the candidates with two thirds or
    half of the head's bytes, in weights of quant "w4" or "w8", for greedy choices and top_k up to
    256 without processors; anything else is computed in full. A candidate may be missed, with odds
    that `Model.screening` measures; those found have the same logits.
    memory_limit: bytes, or a text like "6 GB" or "6GiB", that weights, sessions and snapshots may
    take together; the interpreter and the tokenizer are not counted. With ctx=None the largest
    context that fits is chosen, see `Model.context`. What would exceed it raises MemoryLimitError
    before it is taken: loading, if a session of `ctx` tokens does not fit, and later a session, a
    snapshot, or more tokens. `qdelta.plan` tells beforehand what a model takes.
    cache: folder for converted files; False converts into memory at each load.
    offline: touch no network.
    progress: show progress bars; None: if the output is a terminal.

    Raises FileError, FileAccessError, UnsupportedError, ArgumentError or MemoryLimitError.
    """
    given: dict[str, Any] = {
        "revision": revision, "quant": quant, "ctx": ctx, "yarn": yarn, "threads": threads,
        "kv": kv, "isa": isa, "head": head, "memory_limit": memory_limit, "cache": cache,
        "offline": offline,
        "progress": progress,
    }  # fmt: skip
    defaults = {"quant": "auto", "kv": "auto", "head": "full", "offline": False}
    for name, value in canonical("load", synonyms, _NAMES, _SYNONYMS).items():
        if given[name] != defaults.get(name):
            raise TypeError(f"load() got {name!r} twice, once under another name")
        given[name] = value
    return _load(model, **given)


def _load(
    model: str | Path,
    *,
    revision: str | None,
    quant: str,
    ctx: int | None,
    yarn: float | None,
    threads: int | None,
    kv: str,
    isa: str | None,
    head: str,
    memory_limit: int | str | None,
    cache: str | Path | Literal[False] | None,
    offline: bool,
    progress: bool | None,
) -> Model:
    started = time.perf_counter()
    _check_count("ctx", ctx)
    _check_count("threads", threads)
    core: dict[str, Any] = {
        "context": ctx,
        "yarn": yarn,
        "threads": threads,
        "kv": kv,
        "head": head,
    }
    if memory_limit is not None:
        core["memory_limit"] = parse_bytes(memory_limit, "memory_limit")
        from . import planning

        # Before weights are fetched and converted, which may take long.
        with planning.open_source(
            model, revision=revision, cache=cache or None, offline=offline
        ) as source:
            source.native_plan(quant=source.resolve_quant(quant), **core)
    path = locate(model, revision=revision, offline=offline, cache=cache or None, progress=progress)
    checkpoint = weights.open_model(path, quant, cache, progress, threads=threads)
    files = tokenizer_files(path, checkpoint)
    reading = _ReadingTokenizer(files)
    reading.start()
    # Imports numpy, half as long as the tokenizer takes.
    from .llm import Model

    native = _native.Model(checkpoint, isa=isa, **core)
    return Model(
        native,
        reading.result(),
        config=json.loads(checkpoint.config_json),
        generation_config=parse_json(files, "generation_config.json"),
        load_s=time.perf_counter() - started,
    )


class _ReadingTokenizer(threading.Thread):
    """Makes a tokenizer, most of the time without the interpreter lock."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(name="qdelta-tokenizer")
        self._files = files
        self._made: Tokenizer | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._made = Tokenizer.from_files(self._files)
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def result(self) -> Tokenizer:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made


def _check_count(name: str, count: Any) -> None:
    """Raises ArgumentError for what is no number of 1 to 2^31 - 1, and not None."""
    whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if count is not None and not (whole and 0 < count < 2**31):
        raise ArgumentError(f"{name} is {count!r}, expected 1 or more")
