"""A test of a model's speed, to be run again and again.

Tokens are random: speed does not depend on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .session import feed_prompt

if TYPE_CHECKING:
    from . import _native


@dataclass(frozen=True, slots=True)
class Test:
    """What to time: reading `n_prompt` tokens or generating `n_gen`, after `n_depth` others."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """llama-bench's name of it."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


class Trial:
    """One test on one model, to be run again and again."""

    def __init__(self, model: _native.Model, test: Test) -> None:
        rng = np.random.default_rng(0)
        self.model = model
        self.test = test
        self.tokens = _tokens(rng, test.n_prompt or test.n_gen, model)
        self._session = model.session()
        if test.n_depth:
            feed_prompt(self._session, _tokens(rng, test.n_depth, model), last="none")
        self._start = self._session.snapshot()

    def rewound(self) -> _native.Session:
        """The session where the test begins."""
        self._session.restore(self._start)
        return self._session

    def warm_up(self) -> None:
        """Run the test once, generation until it is known how weights are best read."""
        self.sample()
        while self.test.n_gen and not self.model.settled:
            self.sample()

    def sample(self) -> int:
        """Nanoseconds that the test takes now."""
        session = self.rewound()
        began = time.perf_counter_ns()
        if self.test.n_prompt:
            feed_prompt(session, self.tokens)
            self._screen(session)
        else:
            for i in range(self.test.n_gen):
                session.feed(self.tokens[i : i + 1], "last")
                self._screen(session)
        return time.perf_counter_ns() - began

    def _screen(self, session: _native.Session) -> None:
        """Ask for candidates, as many as the model cards' sampling does: a screened head does
        nothing before, a full one is done."""
        if self.model.head == "screened":
            none = np.empty(0, np.int32), np.empty(0, np.float32)
            session.candidates(20, limit=self.model.vocab_size, ids=none[0], values=none[1])


def _tokens(rng: np.random.Generator, n: int, model: _native.Model) -> Any:
    return rng.integers(0, model.vocab_size, n, dtype=np.int32)
