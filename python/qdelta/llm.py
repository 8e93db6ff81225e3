"""A model with its tokenizer, template and sampling profiles: text in, text out."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import _native, evaluate, options, profiles, stream
from .chat import check_tools, level_messages, refuse_pictures
from .errors import ArgumentError, FileError, UnsupportedError
from .reply import ReasoningSplitter, opens_reasoning
from .results import Comparison, Completion, Message, Perplexity, Score, Screening, Timings
from .sampling import Sampler, Sampling
from .session import Session, token_array
from .stream import AsyncStream, Control, Request, Stream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    Messages = Sequence[Mapping[str, Any] | Message]
    Prompt = str | Sequence[int] | Messages

END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Model:
    """A loaded model; made by `load`. Threads may share it."""

    def __init__(
        self,
        native: _native.Model,
        tokenizer: Tokenizer,
        *,
        config: dict[str, Any],
        generation_config: Mapping[str, Any],
        load_s: float = 0.0,
    ) -> None:
        if tokenizer.vocab_size > native.vocab_size:
            raise FileError(
                f"tokenizer: ids up to {tokenizer.vocab_size - 1}, "
                f"the model has {native.vocab_size} rows"
            )
        self.native = native
        self.tokenizer = tokenizer
        self.config = config  # config.json
        self.generation_config = dict(generation_config)
        self._load_s = load_s
        self._profiles = profiles.profiles(config, generation_config)
        self.stop_ids = _stop_ids(tokenizer, config, generation_config)

    def __repr__(self) -> str:
        yarn = f" (YaRN {self.native.yarn:g})" if self.native.yarn else ""
        return (
            f"<qdelta.Model {self.native.quant}, context {self.context}{yarn}, "
            f"{self.native.threads} threads, {self.native.isa}>"
        )

    @property
    def context(self) -> int:
        """Tokens that a session can hold."""
        return self.native.context

    # Text

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, special=special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def render(self, messages: Any, tools: Any = None, **template_options: Any) -> str:
        """The prompt text of a conversation; see `Tokenizer.render`."""
        return self.tokenizer.render(messages, tools, **template_options)

    def sampling(self, name: str = "auto") -> Sampling:
        """A sampling profile: "chat", "thinking", "coding", "greedy", ...; "auto" is the one
        for the checkpoint's default mode. Raises ArgumentError for names it does not have."""
        return profiles.pick(self._profiles, name, thinking=self._thinks)

    @property
    def sampling_names(self) -> list[str]:
        """Names of the profiles that this model has."""
        return sorted(self._profiles)

    @cached_property
    def _thinks(self) -> bool:
        """Whether the template opens a think block unless told otherwise."""
        if self.tokenizer.chat_template is None:
            return False
        probe = [{"role": "user", "content": "?"}]
        return opens_reasoning(self.render(probe, add_generation_prompt=True))

    # Generation

    def generate(
        self, prompt: str | Sequence[int], **settings: Unpack[options.TextOptions]
    ) -> Completion:
        """Continue a text.

        prompt: text, or token ids. The settings are those of `options.TextOptions`. In a text,
        `<|im_end|>` and the like are ordinary characters unless special=True. Raises
        ContextError if the prompt does not fit, ArgumentError for bad values, TypeError for
        unknown settings.
        """
        run = self._start_text("generate", prompt, settings)
        return cast(Completion, _finish(run))

    def chat(self, messages: str | Messages, **settings: Unpack[options.ChatOptions]) -> Message:
        """Answer a conversation.

        messages: mappings with `role` and `content` (and `tool_calls`, `reasoning_content`), or
        earlier `Message` results; a text is one user message. The settings are those of
        `options.ChatOptions`. Raises like `generate`; UnsupportedError for pictures.
        """
        run = self._start_chat("chat", messages, settings)
        return cast(Message, _finish(run))

    def stream(self, prompt: Prompt, **settings: Unpack[options.AnyOptions]) -> Stream:
        """The events of `generate`, for a text or token ids, or of `chat`, for messages."""
        return self._start("stream", prompt, settings)

    def astream(self, prompt: Prompt, **settings: Unpack[options.AnyOptions]) -> AsyncStream:
        """`stream` for asyncio: `async for event in model.astream(...)`."""
        return AsyncStream(self._start("astream", prompt, settings))

    def _start(self, method: str, prompt: Prompt, settings: Mapping[str, Any]) -> Stream:
        if _is_conversation(prompt):
            return self._start_chat(method, cast("Messages", prompt), settings)
        return self._start_text(method, cast("str | Sequence[int]", prompt), settings)

    def _start_text(
        self, method: str, prompt: str | Sequence[int], settings: Mapping[str, Any]
    ) -> Stream:
        started = time.perf_counter()
        if _is_conversation(prompt):
            raise ArgumentError(f"prompt: {method}() takes a text; use chat() for messages")
        wanted = options.parse(method, settings, options.TEXT_NAMES)
        ids = self._ids(prompt, special=wanted.special)
        timings = Timings(tokenize_s=time.perf_counter() - started)
        return self._run(ids, wanted, self._sampling(wanted, False), None, timings, started)

    def _start_chat(
        self, method: str, messages: str | Messages, settings: Mapping[str, Any]
    ) -> Stream:
        started = time.perf_counter()
        wanted = options.parse(method, settings, options.CHAT_NAMES)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        level = level_messages(messages, system=wanted.system)
        refuse_pictures(level)
        variables = {"add_generation_prompt": True, **wanted.template_options}
        if wanted.think is not None:  # undefined is a mode of its own: the checkpoint's default
            variables["enable_thinking"] = wanted.think
            switch = self.tokenizer.reads_option("enable_thinking")
            if not switch and wanted.think != self._thinks:
                raise UnsupportedError("this checkpoint's chat template has no thinking switch")
        pieces = self.tokenizer.render_pieces(level, check_tools(wanted.tools), **variables)
        rendered = time.perf_counter()
        ids = token_array(self.tokenizer.encode_pieces(pieces))
        timings = Timings(template_s=rendered - started, tokenize_s=time.perf_counter() - rendered)
        opened = opens_reasoning("".join(pieces[-3:]))
        sampling = self._sampling(wanted, opened)
        return self._run(ids, wanted, sampling, ReasoningSplitter(opened), timings, started)

    def _run(
        self,
        prompt: NDArray[np.int32],
        wanted: options.Options,
        sampling: Sampling,
        splitter: ReasoningSplitter | None,
        timings: Timings,
        started: float,
    ) -> Stream:
        evaluate.check_room(len(prompt), self.context)
        timings.load_s = self._load_s
        control = Control(wanted.limits.timeout)
        request = Request(
            prompt=prompt,
            sampler=Sampler(
                sampling,
                limit=self.tokenizer.vocab_size,
                prompt=prompt.tolist() if wanted.processors else (),
                processors=wanted.processors,
            ),
            limits=wanted.limits,
            stop_ids=frozenset() if wanted.limits.ignore_eos else self.stop_ids,
            decoder=self.tokenizer.stream(),
            context=self.context,
            splitter=splitter,
            timings=timings,
            setup_s=time.perf_counter() - started,
            control=control,
        )
        return Stream(stream.generate(self.native.session(), request), control)

    def _sampling(self, wanted: options.Options, thinking: bool) -> Sampling:
        base = wanted.sampling
        if base is None:
            base = profiles.pick(self._profiles, wanted.preset, thinking=thinking)
        return base.but(**wanted.changes)

    # Numbers

    def session(self) -> Session:
        """A new, empty timeline. Raises MemoryLimitError if the model's limit leaves no room."""
        return Session(self.native.session(), context=self.context)

    def logits(self, ids: str | Sequence[int]) -> NDArray[np.float32]:
        """The logits after each token of a text. ids: int [n] or a text -> float32 [n, vocab]."""
        return evaluate.all_logits(self.native, self._ids(ids))

    def score(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Score:
        """Log-probability of each token of `continuation` after `prompt`.

        Texts are tokenised apart, so that the border between them stays where it is.
        """
        started = time.perf_counter()
        ids, more = self._ids(prompt), self._ids(continuation, "continuation")
        tokenize_s = time.perf_counter() - started
        result = evaluate.score(self.native, ids, more)
        result.timings.load_s, result.timings.tokenize_s = self._load_s, tokenize_s
        return result

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        window: int = 512,
        progress: Callable[[int, int], None] | None = None,
    ) -> Perplexity:
        """Perplexity of a text over consecutive windows that do not overlap.

        Every window runs alone from an empty state, its first token is not scored, and an
        incomplete last window is left out. progress: called with (windows done, in all).
        """
        started = time.perf_counter()
        ids = self._ids(text, "text")
        tokenize_s = time.perf_counter() - started
        result = evaluate.perplexity(self.native, ids, window=window, progress=progress)
        result.timings.load_s, result.timings.tokenize_s = self._load_s, tokenize_s
        return result

    def compare(
        self,
        other: Model,
        text: str | Sequence[int],
        *,
        window: int = 512,
        worst: int = 10,
        progress: Callable[[int, int], None] | None = None,
    ) -> Comparison:
        """How far this model's predictions of a text are from those of `other`, the reference.

        The text is cut into windows and scored as in `perplexity`, by both models at the same time;
        the logits of a few tokens are held. worst: how many of the tokens with the largest KL to
        keep. progress: called with (windows done, in all). Raises ArgumentError if the models do
        not have the same tokens.
        """
        started = time.perf_counter()
        different = self.tokenizer.difference(other.tokenizer)
        if different is None and self.native.vocab_size != other.native.vocab_size:
            different = f"{self.native.vocab_size} and {other.native.vocab_size} logits"
        if different is not None:
            raise ArgumentError(f"the models cannot be compared, their tokens differ: {different}")
        ids = self._ids(text, "text")
        if isinstance(text, str) and not np.array_equal(ids, other._ids(text, "text")):
            raise ArgumentError("the models cannot be compared, they cut the text differently")
        tokenize_s = time.perf_counter() - started
        result = evaluate.compare(
            self.native,
            other.native,
            ids,
            window=window,
            worst=worst,
            text=lambda ids: self.decode(ids.tolist(), skip_special=False),
            progress=progress,
        )
        result.timings.load_s, result.timings.tokenize_s = self._load_s, tokenize_s
        return result

    def screening(
        self,
        text: str | Sequence[int],
        *,
        k: int = 20,
        window: int = 512,
        progress: Callable[[int, int], None] | None = None,
    ) -> Screening:
        """How often a screened head misses one of the `k` most likely tokens.

        Both heads run at each position of the text, which is cut into windows as in
        `perplexity`. Raises ArgumentError if the model was not loaded with head="screened".
        """
        ids = self._ids(text, "text")
        limit = self.tokenizer.vocab_size
        return evaluate.screening(
            self.native, ids, limit=limit, k=k, window=window, progress=progress
        )

    def _ids(
        self, prompt: str | Sequence[int], name: str = "prompt", *, special: bool = True
    ) -> NDArray[np.int32]:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, special=special)
        ids = token_array(prompt)
        if not len(ids):
            raise ArgumentError(f"{name}: empty; at least one token is needed")
        beyond = ids[ids >= self.native.vocab_size]
        if len(beyond):
            raise ArgumentError(
                f"{name}: token {beyond[0]}, the vocabulary has {self.native.vocab_size}"
            )
        return ids


def _is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, not a text or token ids."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], (Mapping, Message))


def _finish(run: Stream) -> Completion | Message:
    for _ in run:
        pass
    assert run.result is not None, "the last event carries the result"
    return run.result


def _stop_ids(
    tokenizer: Tokenizer, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> frozenset[int]:
    """Ids that end an answer: the usual tokens by their text, and what the files state."""
    found = [tokenizer.token_id(text) for text in END_TOKENS]
    text_config = config.get("text_config") or {}
    for name, source in (
        ("generation_config.json", generation_config),
        ("config.json", config),
        ("config.json", text_config),
    ):
        stated = source.get("eos_token_id")
        for id in stated if isinstance(stated, list) else [stated]:
            if id is not None and (isinstance(id, bool) or not isinstance(id, int)):
                raise FileError(f"{name}: eos_token_id {reprlib.repr(id)} is not a token id")
            found.append(id)
    return frozenset(id for id in found if id is not None)
