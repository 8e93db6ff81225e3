"""Options of the calls that generate: their names, synonyms and checks.

The names are OpenAI's where it has one. Clients of other servers and libraries find theirs
accepted as synonyms. Anything else is refused with the nearest name, since an option that is
silently ignored is an answer that is silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

from .errors import ArgumentError
from .sampling import Sampling
from .synonyms import canonical

if TYPE_CHECKING:
    from .chat import SystemPolicy
    from .sampling import Order, Processor

SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "logits_processor": "processors",
    "logits_processors": "processors",
    "enable_thinking": "think",
    "thinking": "think",
    "chat_template_kwargs": "template_options",
    "random_seed": "seed",
    "profile": "preset",
}

SAMPLING_NAMES = frozenset(item.name for item in fields(Sampling))
COMMON_NAMES = SAMPLING_NAMES | {
    "max_tokens",
    "stop",
    "timeout",
    "preset",
    "sampling",
    "processors",
    "ignore_eos",
}
TEXT_NAMES = COMMON_NAMES | {"special"}
CHAT_NAMES = COMMON_NAMES | {
    "think",
    "tools",
    "system",
    "template_options",
    "reasoning_effort",
    "stop_in_reasoning",
}


class CommonOptions(TypedDict, total=False):
    """Options of every call that generates."""

    max_tokens: int | None  # None: until the model ends, or the context is full
    temperature: float  # this and the next ones override the profile; see `Sampling`
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    order: Order
    preset: str  # "auto", or a profile's name: "chat", "thinking", "coding", "greedy", ...
    sampling: Sampling | None  # the base instead of a profile
    processors: Sequence[Processor]  # see `sampling.Processor`
    stop: str | Sequence[str]  # ends the text before the first of these
    timeout: float | None  # seconds
    ignore_eos: bool  # go on after end tokens


class TextOptions(CommonOptions, total=False):
    """Options for continuing a text."""

    special: bool  # read spelled-out special tokens in the prompt as such; default False


class ChatOptions(CommonOptions, total=False):
    """Options for answering a conversation."""

    think: bool | None  # None: the checkpoint's default
    tools: Sequence[Mapping[str, Any]] | None
    system: SystemPolicy  # system messages that are not first: "merge" or "strict"
    template_options: Mapping[str, Any]  # further variables of the chat template
    reasoning_effort: str | None  # "none" is think=False, others think=True
    stop_in_reasoning: bool  # look for `stop` in the reasoning, too; default False


class AnyOptions(TextOptions, ChatOptions, total=False):
    """Options of calls that take a text or a conversation."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a generation ends."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_in_reasoning: bool = False
    timeout: float | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one call, checked."""

    limits: Limits
    sampling: Sampling | None  # None: a profile
    preset: str
    changes: dict[str, Any]  # fields of Sampling that were given
    processors: tuple[Processor, ...] = ()
    special: bool = False
    think: bool | None = None
    tools: Any = None
    system: SystemPolicy = "merge"
    template_options: dict[str, Any] = field(default_factory=dict)


def parse(method: str, given: Mapping[str, Any], names: frozenset[str]) -> Options:
    """Check the options of a call to `method`, which accepts `names`.

    Raises TypeError for an unknown option or one given twice, ArgumentError for a bad value.
    """
    values = canonical(method, given, names, SYNONYMS)
    if values.get("sampling") is not None and values.get("preset", "auto") != "auto":
        raise ArgumentError("preset, sampling: only one of them can be the base")
    sampling = values.get("sampling")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ArgumentError(f"sampling: a Sampling expected, got {type(sampling).__name__}")
    changes = {name: values[name] for name in SAMPLING_NAMES if name in values}
    for name in SAMPLING_NAMES - {"seed"}:
        if changes.get(name, 0) is None:  # as clients write "not given"
            del changes[name]
    Sampling(**changes)  # refuses bad values before any work is done
    think, template_options = _thinking(values)
    return Options(
        limits=Limits(
            max_tokens=_max_tokens(values.get("max_tokens")),
            stop=_stops(values.get("stop")),
            stop_in_reasoning=bool(values.get("stop_in_reasoning", False)),
            timeout=_timeout(values.get("timeout")),
            ignore_eos=bool(values.get("ignore_eos", False)),
        ),
        processors=_processors(values.get("processors")),
        sampling=sampling,
        preset=values.get("preset") or "auto",
        changes=changes,
        special=bool(values.get("special", False)),
        think=think,
        tools=values.get("tools"),
        system=values.get("system", "merge"),
        template_options=template_options,
    )


def _thinking(values: Mapping[str, Any]) -> tuple[bool | None, dict[str, Any]]:
    """The thinking switch from its three spellings, and the other template options."""
    given = values.get("template_options") or {}
    if not isinstance(given, Mapping):
        raise ArgumentError(f"template_options: a mapping expected, got {type(given).__name__}")
    template_options = dict(given)
    effort = values.get("reasoning_effort")
    spelled = {
        "think": values.get("think"),
        "template_options: enable_thinking": template_options.pop("enable_thinking", None),
        "reasoning_effort": None if effort is None else effort != "none",
    }
    said = {name: value for name, value in spelled.items() if value is not None}
    for name, value in said.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: True, False or None expected, got {value!r}")
    if len(set(said.values())) > 1:
        raise ArgumentError(f"{', '.join(said)}: they contradict each other")
    return next(iter(said.values()), None), template_options


def _max_tokens(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ArgumentError(f"max_tokens: an integer of 0 or more expected, got {value!r}")
    return int(value)


def _timeout(value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or math.isnan(value) or value < 0:
        raise ArgumentError(f"timeout: seconds, 0 or more, expected, got {value!r}")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise ArgumentError(f"stop: a text or a list of texts expected, got {value!r}")
    stops = (value,) if isinstance(value, str) else tuple(value)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ArgumentError(f"stop: texts of at least one character expected, got {stop!r}")
    return stops


def _processors(value: Any) -> tuple[Processor, ...]:
    if value is None:
        return ()
    processors = tuple(value) if isinstance(value, Sequence) else (value,)
    for processor in processors:
        if not callable(processor):
            raise ArgumentError(f"processors: callables expected, got {processor!r}")
    return processors
