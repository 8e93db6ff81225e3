"""Where the time of a test goes.

The test runs as the stream that a user gets: the prompt is fed, tokens are drawn with the sampling
of the model card, text comes out. The core counts its own time by part (see
`_native.Session.stop_profile`); the sampler's time is that of its calls, which search the logits
in the core; what remains of the wall time is Python's. Decoding to text uses the demo's tokenizer
for every model: bench loads none, and looking up a token's bytes costs the same in all.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import costs, profiles
from .options import Limits
from .results import Timings
from .sampling import Sampler
from .stream import Request, Stream, generate
from .tokenizer import TextDecoder, Tokenizer

if TYPE_CHECKING:
    from .trial import Trial

# As they are shown: the core's, then those around it, then the rest.
PARTS = (
    "matrices", "delta_rule", "attention", "head", "norms", "synchronisation", "sampling",
    "python", "other",
)  # fmt: skip


@dataclass(slots=True)
class Part:
    """One part's time, and what it did in that time where that is known."""

    share: float  # of the wall time; together 1
    us_per_token: float
    gb_per_s: float | None = None  # bytes it had to move, decoding
    gop_per_s: float | None = None  # operations it had to do, reading a prompt


class _AnyTokenDecoder(TextDecoder):
    """The demo's decoder for ids of any vocabulary, which it takes modulo its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._n = tokenizer.vocab_size

    def push(self, id: int) -> str:
        return super().push(id % self._n)


def profile(trial: Trial, config: dict[str, Any], repetitions: int) -> dict[str, Part]:
    """Time by part, in the order of `PARTS`, over `repetitions` runs after a warm-up."""
    tokenizer = Tokenizer("demo")
    _run(trial, config, tokenizer)
    seconds: Counter[str] = Counter()
    for _ in range(repetitions):
        seconds.update(_run(trial, config, tokenizer))
    model, test = trial.model, trial.test
    tokens = repetitions * (test.n_prompt or test.n_gen)
    moved: dict[str, int] = {}
    done: dict[str, float] = {}
    if test.n_gen:
        moved = costs.decode_bytes(model, test.n_depth + test.n_gen // 2)
    else:
        done = costs.prefill_operations(config, test.n_depth + test.n_prompt / 2)

    def rate(amounts: dict[str, int] | dict[str, float], name: str) -> float | None:
        known = amounts.get(name) and seconds[name] > 0
        return amounts[name] * tokens / seconds[name] / 1e9 if known else None

    total = sum(seconds.values())
    return {
        name: Part(
            share=seconds[name] / total,
            us_per_token=seconds[name] / tokens * 1e6,
            gb_per_s=rate(moved, name),
            gop_per_s=rate(done, name),
        )
        for name in PARTS
    }


def _run(trial: Trial, config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds by part of one generation."""
    model, test, session = trial.model, trial.test, trial.rewound()
    # A decode test begins with a prompt of one token: its steps are a feed and a choice each.
    prompt, n_gen = (trial.tokens, 1) if test.n_prompt else (trial.tokens[:1], test.n_gen)
    sampling = profiles.pick(profiles.profiles(config, {}), "auto", thinking=False)
    request = Request(
        prompt=prompt,
        sampler=Sampler(sampling.but(seed=0), limit=model.vocab_size),
        limits=Limits(max_tokens=n_gen),
        stop_ids=frozenset(),
        decoder=_AnyTokenDecoder(tokenizer),
        context=model.context - test.n_depth,
        splitter=None,
        timings=Timings(),
        setup_s=0.0,
    )
    session.start_profile()
    began = time.perf_counter()
    for _ in Stream(generate(session, request), request.control):
        pass
    wall = time.perf_counter() - began
    seconds = session.stop_profile()
    core = sum(seconds.values())
    sampling_s = request.timings.sample_s
    return {**seconds, "sampling": sampling_s, "python": wall - core - sampling_s}
