"""How much memory a model will take, told before it is fetched, converted or loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _native, weights
from .errors import ArgumentError, FileError
from .memory import parse_bytes, size_text, usable_memory
from .sizes import name_of
from .source import located_header

# A tokenizer's tables, for each token of the vocabulary: measured with the released one.
_TOKENIZER_BYTES = 72


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a model takes with some sessions, by purpose; `str()` gives a table.

    The interpreter, and what a caller keeps of logits, is not in it.
    """

    model: str
    quant: str  # what the weights are, or are converted to
    ctx: int  # tokens of each session
    kv_format: str  # of the attention cache
    sessions: int
    weights: int  # of the text model; mapped from files, and shared by all sessions
    tokenizer: int  # about
    kv: int  # attention cache of a full session
    state: int  # recurrent and convolution states of a session
    scratch: int  # work buffers of a session

    @property
    def session(self) -> int:
        """Bytes of one session."""
        return self.kv + self.state + self.scratch

    @property
    def total(self) -> int:
        return self.weights + self.tokenizer + self.sessions * self.session

    def fits(self, memory: int | str | None = None) -> bool:
        """Whether the total fits into `memory`, bytes or a text like "6 GB".

        None: what this computer has to spare now. Raises ArgumentError for anything else, or if
        the system does not tell.
        """
        size = usable_memory() if memory is None else parse_bytes(memory, "memory")
        if size is None:
            raise ArgumentError("memory: this system does not tell how much it has; give it")
        return self.total <= size

    def __str__(self) -> str:
        one = self.sessions == 1
        rows = [
            ("weights", self.weights),
            ("tokenizer, about", self.tokenizer),
            (f"attention cache ({self.kv_format})", self.kv),
            ("recurrent and convolution states", self.state),
            ("work buffers", self.scratch),
        ]
        if not one:
            rows.append((f"all {self.sessions} sessions", self.sessions * self.session))
        rows.append(("total", self.total))
        title = f"{self.model}, {self.quant}, "
        title += f"a session of {self.ctx} tokens" if one else f"each session of {self.ctx} tokens"
        texts = [(name, size_text(size)) for name, size in rows]
        wide, narrow = (max(map(len, column)) for column in zip(*texts, strict=True))
        return "\n".join([title, *(f"  {a:<{wide}}  {b:>{narrow}}" for a, b in texts)])


def plan(
    model: str | Path | Mapping[str, Any],
    *,
    quant: str = "auto",
    ctx: int | None = None,
    yarn: float | None = None,
    threads: int | None = None,
    kv: str = "auto",
    head: str = "full",
    sessions: int = 1,
    revision: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> MemoryPlan:
    """What a model and a number of sessions will take, before anything is loaded.

    model: as for `load`, or what its config.json says. No weights are fetched: of a checkpoint on
    the hub only the small files, and its weights are taken to have the type that config.json
    states; of a GGUF file on the hub the header. The other settings are those of `load`; sessions
    are planned with all their `ctx` tokens, which `load` takes as they come. Raises like `load`.
    """
    with open_source(model, revision=revision, cache=cache, offline=offline) as source:
        return source.plan(
            quant=quant, ctx=ctx, yarn=yarn, threads=threads, kv=kv, head=head, sessions=sessions
        )


class Source:
    """What plans are made from: a checkpoint's headers, or config.json alone."""

    def __init__(self, model: _native.Checkpoint | str, name: str) -> None:
        self._model = model
        self.name = name
        text = model if isinstance(model, str) else model.config_json
        try:
            self._config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileError(f"{name}: config.json: not valid JSON: {error}") from None

    def close(self) -> None:
        """Let go of the files, which some systems do not remove before; nothing can follow."""
        del self._model

    @property
    def unknown_tensors(self) -> list[str] | None:
        """Names of tensors that Qwen3.5 does not have; None if config.json alone is known."""
        return None if isinstance(self._model, str) else self._model.unknown_tensors()

    @property
    def quants(self) -> tuple[str, ...]:
        """The formats that its weights can have, of fewest bits first."""
        if not isinstance(self._model, str):
            if self._model.quant != "none":
                return (self._model.quant,)
            if weights.automatic(self._model) == "gguf":
                return ("gguf", "none")
        return ("small", "balanced", "fine", "best", "w8", "none")

    def plan(
        self, *, quant: str = "auto", ctx: int | None = None, sessions: int = 1, **settings: Any
    ) -> MemoryPlan:
        """See the function `plan`."""
        if isinstance(sessions, bool) or not isinstance(sessions, int) or sessions < 0:
            raise ArgumentError(f"sessions is {sessions!r}, expected a number of sessions")
        quant = self.resolve_quant(quant)
        native = self.native_plan(quant=quant, context=ctx, **settings)
        vocab_size = self._config.get("text_config", self._config)["vocab_size"]
        return MemoryPlan(
            model=self.name,
            quant=quant,
            ctx=native.context,
            kv_format=native.kv_format,
            sessions=sessions,
            weights=native.weights,
            tokenizer=_TOKENIZER_BYTES * vocab_size,
            kv=native.kv,
            state=native.state,
            scratch=native.scratch,
        )

    def resolve_quant(self, quant: str) -> str:
        """What `load` makes of `quant`. Raises like `load`."""
        weights.check_quant(quant)
        if isinstance(self._model, _native.Checkpoint):
            return weights.resolve_quant(self._model, self.name, quant)
        if quant != "auto":
            return quant
        small = self.native_plan(quant="none").weights < weights.SMALL_BYTES
        return "none" if small else weights.DEFAULT

    def native_plan(self, **settings: Any) -> _native.MemoryPlan:
        """The core's plan; settings as for `_native.memory_plan`."""
        if isinstance(self._model, str):
            settings["dtype"] = self._dtype()
        return _native.memory_plan(self._model, **settings)

    def _dtype(self) -> str:
        """The type of the weights that config.json states."""
        top = self._config if isinstance(self._config, dict) else {}
        text = top.get("text_config")
        for part in (text if isinstance(text, dict) else {}, top):
            stated = part.get("dtype") or part.get("torch_dtype")
            if stated:
                return str(stated)
        return "bfloat16"


@contextmanager
def open_source(
    model: str | Path | Mapping[str, Any],
    *,
    revision: str | None = None,
    cache: str | Path | None,
    offline: bool,
) -> Iterator[Source]:
    """For the time of the block: the headers of a checkpoint that is here or of a GGUF file on the
    hub, or the config.json of a name on the hub."""
    if isinstance(model, Mapping):
        if revision is not None:
            raise ArgumentError("revision is for names on the hub")
        text = json.dumps(dict(model))
        _native.memory_plan(text, quant="none")  # so that no size is missing
        yield Source(text, f"Qwen3.5 {name_of(dict(model))}")
        return
    with located_header(
        model, revision=revision, offline=offline, cache=cache, progress=False
    ) as path:
        if path.is_dir() and not Path(model).exists() and str(model) != "demo":
            try:
                text = (path / "config.json").read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FileError(f"{model}: config.json: not UTF-8 at byte {error.start}") from None
            yield Source(text, str(model))
            return
        source = Source(_native.Checkpoint(str(path)), str(model))
        try:
            yield source
        finally:
            source.close()
