"""What generation and scoring hand back: plain slotted dataclasses.

Times are seconds of wall clock; time that a caller spends between two events of a stream is
never counted. Rates are tokens per second, 0.0 where nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
EventKind = Literal["reasoning", "text", "done"]

__all__ = [
    "Comparison",
    "Completion",
    "Event",
    "EventKind",
    "FinishReason",
    "Message",
    "Perplexity",
    "Score",
    "Screening",
    "Timings",
    "Usage",
    "WorstToken",
]


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


@dataclass(slots=True)
class Usage:
    """Token counts of one call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0  # the end-of-turn token included
    reasoning_tokens: int = 0  # those of `completion_tokens` produced before the reasoning ended

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Where the time of one call went, in seconds."""

    load_s: float = 0.0  # of the model, once; the same in every result of that model
    template_s: float = 0.0
    tokenize_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0  # from the call to the choice of the first token
    decode_s: float = 0.0  # feeding generated tokens
    sample_s: float = 0.0  # choosing tokens
    prefill_tokens: int = 0
    decode_tokens: int = 0  # generated tokens that were fed back

    @property
    def prefill_tokens_per_s(self) -> float:
        return _rate(self.prefill_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second after the first one, their sampling included."""
        return _rate(self.decode_tokens, self.decode_s + self.sample_s)


@dataclass(slots=True)
class Completion:
    """Result of continuing a text."""

    text: str
    tokens: list[int]  # generated ids, with the end token that stopped it, if one did
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Message:
    """The assistant's answer to a conversation.

    It may be appended to the list of messages as it is; its reasoning travels along and the
    template decides whether the model sees it again.
    """

    text: str
    reasoning: str | None  # None: the prompt did not open a think block
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    def __str__(self) -> str:
        return self.text

    @property
    def role(self) -> str:
        return "assistant"

    def to_dict(self) -> dict[str, Any]:
        """The message in the form of a Chat Completions history."""
        entry: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning is not None:
            entry["reasoning_content"] = self.reasoning
        return entry


@dataclass(slots=True)
class Event:
    """One step of a stream.

    kind "reasoning" and "text": `text` is the next piece, never empty. kind "done": the last
    event; `result` holds the Completion (text prompts) or Message (conversations).
    """

    kind: EventKind
    text: str = ""
    result: Completion | Message | None = None


@dataclass(slots=True)
class Score:
    """Log-probabilities of a continuation, natural logarithm."""

    tokens: list[int]
    logprobs: list[float]  # one per token
    total: float
    greedy: bool  # every token was the most likely one
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class Perplexity:
    """exp of the mean negative log-probability of a text; `float()` gives `perplexity`."""

    perplexity: float
    second_half: float  # the same over the second half of each window only
    mean_loss: float  # nats a token; perplexity = exp(mean_loss)
    windows: int
    scored: int  # tokens that `perplexity` averages over
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    def __float__(self) -> float:
        return self.perplexity


@dataclass(slots=True)
class WorstToken:
    """A place of a text where two models differ much."""

    position: int  # of the token among those of the text
    before: str  # the end of the text that both models had read
    token: str  # what came
    kl: float  # nats
    likeliest: str  # what the model held most likely
    reference_likeliest: str  # what the reference did


@dataclass(slots=True)
class Comparison:
    """How far a model's predictions of a text are from those of a reference.

    KL is the divergence KL(reference || model) of the two distributions of the next token, in
    nats, over the scored tokens.
    """

    perplexity: Perplexity
    reference: Perplexity
    mean_kl: float
    median_kl: float
    p99_kl: float  # 99 % of the tokens have no more
    p999_kl: float  # 99.9 %
    max_kl: float
    same_top: float  # part of the tokens at which both hold the same one most likely
    windows: int
    scored: int
    worst: list[WorstToken]  # of the largest KL, that first
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class Screening:
    """What a screened head took and what it missed, over the positions of a text."""

    k: int  # candidates that were asked for at each position
    positions: int
    missed: int  # of k * positions candidates
    missed_positions: int  # positions with a missed candidate
    full_positions: int  # positions where it would have taken too many, and all were computed
    scored: float  # part of the logits computed exactly at the other positions, mean
    most_scored: float  # the same at the worst of them
