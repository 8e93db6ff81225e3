"""How likely a model finds a text: logits, log-probabilities, perplexity.

Log-probabilities are natural logarithms of the softmax over the whole row, padded entries of
the vocabulary included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import ArgumentError, ContextError
from .results import Perplexity, Score, Screening, Timings, Usage
from .session import PREFILL_CHUNK, feed_prompt, pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _native

# Bytes of logits held at once when only log-probabilities of them are wanted.
_LOGITS_BYTES = 128 << 20


def score(
    model: _native.Model, prompt: NDArray[np.int32], continuation: NDArray[np.int32]
) -> Score:
    """Log-probability of each token of `continuation` after `prompt`; int32 [n] each, n >= 1."""
    whole = np.concatenate([prompt, continuation])
    check_room(len(whole) - 1, model.context)
    begun = time.perf_counter()
    session = model.session()
    if len(prompt) > 1:
        feed_prompt(session, prompt[:-1], last="none")
    logprobs, best = [], True
    for rows, targets in _scored(model, session, whole[len(prompt) - 1 :]):
        logprobs += _logprobs(rows, targets).tolist()
        best = best and bool(np.all(rows.argmax(axis=1) == targets))
    seconds = time.perf_counter() - begun
    return Score(
        tokens=continuation.tolist(),
        logprobs=logprobs,
        total=math.fsum(logprobs),
        greedy=best,
        usage=Usage(prompt_tokens=len(whole)),
        timings=Timings(prefill_s=seconds, prefill_tokens=session.n_tokens),
    )


def perplexity(
    model: _native.Model,
    tokens: NDArray[np.int32],
    *,
    window: int,
    progress: Callable[[int, int], None] | None,
) -> Perplexity:
    """Perplexity over consecutive windows that do not overlap.

    Each window runs alone from an empty state; its first token is not scored; an incomplete
    last window is left out. tokens: int32 [n]. progress: called with (windows done, in all).
    """
    check_window(window, model.context)
    n_windows = len(tokens) // window
    if n_windows == 0:
        raise ArgumentError(
            f"text: {len(tokens)} tokens, shorter than one window of {window}; "
            "a smaller window fits"
        )
    begun = time.perf_counter()
    losses = np.empty((n_windows, window - 1))
    session = model.session()
    for index in range(n_windows):
        session.reset()
        part = tokens[index * window : (index + 1) * window]
        done = 0
        for rows, targets in _scored(model, session, part):
            losses[index, done : done + len(targets)] = -_logprobs(rows, targets)
            done += len(targets)
        if progress is not None:
            progress(index + 1, n_windows)
    seconds = time.perf_counter() - begun
    mean_loss = float(losses.mean())
    # Token i is scored in column i - 1, so the second half begins at column window / 2 - 1.
    second_half = float(losses[:, window // 2 - 1 :].mean())
    return Perplexity(
        perplexity=_exp(mean_loss),
        second_half=_exp(second_half),
        mean_loss=mean_loss,
        windows=n_windows,
        scored=losses.size,
        usage=Usage(prompt_tokens=n_windows * window),
        timings=Timings(prefill_s=seconds, prefill_tokens=losses.size),
    )


def screening(
    model: _native.Model,
    tokens: NDArray[np.int32],
    *,
    limit: int,
    k: int,
    window: int,
    progress: Callable[[int, int], None] | None,
) -> Screening:
    """How often a screened head misses one of the k best tokens, over windows of a text.

    Windows are as in `perplexity`, the last one may be incomplete; every position counts.
    limit: ids from here on are no candidates. tokens: int32 [n].
    """
    check_window(window, model.context)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k: an integer of 1 or more expected, got {k!r}")
    if model.head != "screened":
        raise ArgumentError('head: "screened" and quantised weights expected')
    session = model.session()
    windows = list(pieces(tokens, window))
    rows: list[tuple[int, int]] = []
    for index, part in enumerate(windows):
        session.reset()
        for piece in pieces(part, _rows_at_once(model)):
            session.feed(piece, "all")
            rows += session.screening(k, limit=limit)
        if progress is not None:
            progress(index + 1, len(windows))
    counts, missed = np.array(rows).T
    scored = counts[counts < model.vocab_size] / model.vocab_size
    return Screening(
        k=k,
        positions=len(rows),
        missed=int(missed.sum()),
        missed_positions=int(np.count_nonzero(missed)),
        full_positions=len(rows) - len(scored),
        scored=float(scored.mean()) if len(scored) else 0.0,
        most_scored=float(scored.max(initial=0.0)),
    )


def all_logits(model: _native.Model, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The row after each token, from an empty state. int32 [n] -> float32 [n, vocab]."""
    check_room(len(tokens), model.context)
    session = model.session()
    rows = np.empty((len(tokens), model.vocab_size), np.float32)
    done = 0
    for piece in pieces(tokens):
        session.feed(piece, "all")
        rows[done : done + len(piece)] = session.logits()
        done += len(piece)
    return rows


def check_room(needed: int, available: int) -> None:
    """Raise ContextError if `needed` tokens do not fit."""
    if needed > available:
        raise ContextError(needed, available)


def check_window(window: int, available: int) -> None:
    """Raise ArgumentError unless `window` is a number of tokens to score together."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ArgumentError(f"window: an integer of 2 or more expected, got {window!r}")
    check_room(window, available)


def _rows_at_once(model: _native.Model) -> int:
    return max(1, min(PREFILL_CHUNK, _LOGITS_BYTES // (4 * model.vocab_size)))


def _scored(
    model: _native.Model, session: _native.Session, tokens: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Feed all tokens but the last; yield rows of logits with the tokens that follow them."""
    done = 0
    for piece in pieces(tokens[:-1], _rows_at_once(model)):
        session.feed(piece, "all")
        done += len(piece)
        yield session.logits(), tokens[done - len(piece) + 1 : done + 1]


def _logprobs(rows: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Log-softmax of each row at its target. float32 [n, vocab], int32 [n] -> float64 [n]."""
    best = rows.max(axis=1)
    sums = np.exp(rows - best[:, None]).sum(axis=1, dtype=np.float64)
    chosen = rows[np.arange(len(targets)), targets]
    logprobs: NDArray[np.float64] = (chosen - best).astype(np.float64) - np.log(sums)
    return logprobs


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
