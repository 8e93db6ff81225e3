"""The loop that generates, and the streams through which its events leave.

One generation has a session of its own, so leaving it at any point (an exception, Ctrl-C, an
iterator that nobody asks any further) concerns nothing else of the model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from .reply import Part, ReasoningSplitter, StopStrings
from .results import Completion, Event, FinishReason, Message, Timings, Usage
from .session import feed_prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _native
    from .options import Limits
    from .sampling import Sampler
    from .tokenizer import TextDecoder


class Control:
    """Whether a generation is still wanted; `cancelled` may be set from any thread."""

    def __init__(self, timeout: float | None) -> None:
        self.cancelled = False
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def ended(self) -> FinishReason | None:
        if self.cancelled:
            return "cancelled"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "timeout"
        return None


@dataclass(slots=True)
class Request:
    """Everything that one generation needs."""

    prompt: NDArray[np.int32]
    sampler: Sampler
    limits: Limits
    stop_ids: frozenset[int]  # empty: end tokens are like any other
    decoder: TextDecoder
    context: int  # tokens that the session can hold
    splitter: ReasoningSplitter | None  # None: a text is continued, all of it is answer
    timings: Timings
    setup_s: float  # from the start of the call until now
    control: Control = field(default_factory=lambda: Control(None))


def generate(session: _native.Session, request: Request) -> Generator[Event, None, None]:
    """Events of a generation: reasoning and text as they become certain, then one "done"."""
    run = _Run(request)
    yield from run.events(session)
    yield Event("done", result=run.result())


class _Run:
    """A generation in progress: the tokens chosen, the text made of them, the reason to end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.opened = request.splitter is not None and request.splitter.in_reasoning
        self.tokens: list[int] = []
        self.reasoning_tokens = 0
        self.said: dict[str, list[str]] = {"reasoning": [], "text": []}
        stops = request.limits.stop
        self.matchers = {
            "reasoning": StopStrings(stops if request.limits.stop_in_reasoning else ()),
            "text": StopStrings(stops),
        }
        self.finish_reason: FinishReason = "length"

    def events(self, session: _native.Session) -> Generator[Event, None, None]:
        request, timings = self.request, self.request.timings
        room = request.context - len(request.prompt) + 1  # the last token need not be fed
        limit = room if request.limits.max_tokens is None else request.limits.max_tokens
        limit = min(limit, room)
        if limit == 0:
            return
        clock = time.perf_counter
        started = begun = clock()
        whole = feed_prompt(session, request.prompt, go_on=lambda: not request.control.ended())
        timings.prefill_s = clock() - begun
        timings.prefill_tokens = session.n_tokens
        if not whole:
            self.finish_reason = request.control.ended() or "cancelled"
            return
        fed = np.empty(1, np.int32)
        while True:
            begun = clock()
            token = request.sampler.choose(session)
            chosen = clock()
            timings.sample_s += chosen - begun
            if not self.tokens:
                timings.first_token_s = request.setup_s + chosen - started
            yield from self.accept(token)
            if self.is_last(token, limit):
                break
            fed[0] = token
            begun = clock()
            session.feed(fed, "last")
            timings.decode_s += clock() - begun
            timings.decode_tokens += 1
        yield from self.rest()

    def accept(self, token: int) -> Iterator[Event]:
        """Take note of a chosen token; events of the text that it completes."""
        splitter = self.request.splitter
        self.tokens.append(token)
        self.reasoning_tokens += splitter is not None and splitter.in_reasoning
        if token in self.request.stop_ids:
            return iter(())
        return self.say(self.request.decoder.push(token))

    def say(self, text: str) -> Iterator[Event]:
        """Events of new text, after the reasoning is told apart and stop strings are found."""
        if not text:
            return
        splitter = self.request.splitter
        parts: list[Part] = [("text", text)] if splitter is None else splitter.push(text)
        yield from self.match(parts)

    def match(self, parts: list[Part]) -> Iterator[Event]:
        """Events of consecutive parts, up to a stop string."""
        for kind, part in parts:
            if kind == "text":  # the reasoning is complete: what was held of it goes first
                yield from self.emit("reasoning", self.matchers["reasoning"].finish())
            yield from self.emit(kind, self.matchers[kind].push(part))
            if self.stopped:
                return

    def emit(self, kind: Literal["reasoning", "text"], text: str) -> Iterator[Event]:
        if text:
            self.said[kind].append(text)
            yield Event(kind, text)

    @property
    def stopped(self) -> bool:
        return self.matchers["text"].found or self.matchers["reasoning"].found

    def is_last(self, token: int, limit: int) -> bool:
        """Whether the generation ends with this token; sets the reason."""
        if self.stopped or token in self.request.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= limit:
            self.finish_reason = "length"
        else:
            ended = self.request.control.ended()
            if ended is None:
                return False
            self.finish_reason = ended
        return True

    def rest(self) -> Iterator[Event]:
        """Events of what was held back, unless a stop string ended the text."""
        if self.stopped:
            return
        yield from self.say(self.request.decoder.finish())
        if self.request.splitter is not None and not self.stopped:
            yield from self.match(self.request.splitter.finish())
        if not self.stopped:
            yield from self.emit("reasoning", self.matchers["reasoning"].finish())
            yield from self.emit("text", self.matchers["text"].finish())

    def result(self) -> Completion | Message:
        request = self.request
        usage = Usage(len(request.prompt), len(self.tokens), self.reasoning_tokens)
        text = "".join(self.said["text"])
        if request.splitter is None:
            return Completion(text, self.tokens, self.finish_reason, usage, request.timings)
        return Message(
            text=text,
            reasoning="".join(self.said["reasoning"]) if self.opened else None,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            usage=usage,
            timings=request.timings,
        )


class Stream(Iterator[Event]):
    """Events of one generation, made as they are asked for.

    Use it as an iterator, and as a context manager where it may be left early. `result` holds
    the Completion or Message once the last event has come. `cancel` may be called from another
    thread: the generation ends within a token, or a piece of the prompt, and its last event
    tells what there was until then.
    """

    def __init__(self, events: Generator[Event, None, None], control: Control) -> None:
        self._events = events
        self._control = control
        self.result: Completion | Message | None = None

    def __next__(self) -> Event:
        event = next(self._events)
        if event.result is not None:
            self.result = event.result
        return event

    def cancel(self) -> None:
        """End the generation soon; safe from any thread, at any time."""
        self._control.cancelled = True

    def close(self) -> None:
        """End the generation; no event comes any more."""
        self.cancel()
        # Another thread is inside the generation if this fails; it will see the flag.
        with contextlib.suppress(ValueError):
            self._events.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[Event]):
    """A `Stream` for asyncio: every step runs in a thread of its own.

    Cancelling the task that waits for an event ends the generation. Use it as an asynchronous
    context manager, or call `aclose`, where it may be left early.
    """

    def __init__(self, stream: Stream) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._stream = stream
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qdelta-stream")

    @property
    def result(self) -> Completion | Message | None:
        return self._stream.result

    async def __anext__(self) -> Event:
        import asyncio

        loop = asyncio.get_running_loop()
        try:
            event = await loop.run_in_executor(self._thread, next, self._stream, None)
        except BaseException:
            self.cancel()
            self._thread.shutdown(wait=False)
            raise
        if event is None:
            self._thread.shutdown(wait=False)
            raise StopAsyncIteration
        return event

    def cancel(self) -> None:
        """End the generation soon; safe from any thread, at any time."""
        self._stream.cancel()

    async def aclose(self) -> None:
        """End the generation and wait until it has ended."""
        import asyncio

        self.cancel()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError):  # the thread was already dismissed
            await loop.run_in_executor(self._thread, self._stream.close)
        self._thread.shutdown(wait=False)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
