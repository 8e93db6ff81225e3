"""How likely a model finds a text, and how near it is to another: logits, log-probabilities,
perplexity, KL divergence.

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
from .results import Comparison, Perplexity, Score, Screening, Timings, Usage, WorstToken
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
    for rows, targets in _scored(session, whole[len(prompt) - 1 :], _rows_at_once(model)):
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
    parts = _windows(tokens, window, model.context)
    begun = time.perf_counter()
    losses = np.empty((len(parts), window - 1))
    session = model.session()
    rows_at_once = _rows_at_once(model)
    for index, part in enumerate(parts):
        session.reset()
        done = 0
        for rows, targets in _scored(session, part, rows_at_once):
            losses[index, done : done + len(targets)] = -_logprobs(rows, targets)
            done += len(targets)
        if progress is not None:
            progress(index + 1, len(parts))
    seconds = time.perf_counter() - begun
    return _perplexity(losses, Timings(prefill_s=seconds, prefill_tokens=losses.size))


def _windows(tokens: NDArray[np.int32], window: int, context: int) -> NDArray[np.int32]:
    """The whole windows of a text. int32 [n] -> int32 [windows, window]."""
    check_window(window, context)
    n_windows = len(tokens) // window
    if n_windows == 0:
        raise ArgumentError(
            f"text: {len(tokens)} tokens, shorter than one window of {window}; "
            "a smaller window fits"
        )
    return tokens[: n_windows * window].reshape(n_windows, window)


def _perplexity(losses: NDArray[np.float64], timings: Timings) -> Perplexity:
    """losses: of all tokens of the windows but the first ones, float64 [windows, window - 1]."""
    windows, scored = losses.shape
    mean_loss = float(losses.mean())
    # Token i is scored in column i - 1, so the second half begins at column window / 2 - 1.
    second_half = float(losses[:, (scored + 1) // 2 - 1 :].mean())
    return Perplexity(
        perplexity=_exp(mean_loss),
        second_half=_exp(second_half),
        mean_loss=mean_loss,
        windows=windows,
        scored=losses.size,
        usage=Usage(prompt_tokens=windows * (scored + 1)),
        timings=timings,
    )


def compare(
    model: _native.Model,
    reference: _native.Model,
    tokens: NDArray[np.int32],
    *,
    window: int,
    worst: int,
    text: Callable[[NDArray[np.int32]], str],
    progress: Callable[[int, int], None] | None,
) -> Comparison:
    """How far `model` is from `reference` over the windows of `perplexity`.

    Both run at the same time, so that only logits of a few tokens are held. worst: how many of
    the tokens with the largest KL are kept. text: decodes ids. tokens: int32 [n].
    """
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
        raise ArgumentError(f"worst: an integer of 0 or more expected, got {worst!r}")
    parts = _windows(tokens, window, min(model.context, reference.context))
    begun = time.perf_counter()
    shape = (len(parts), window - 1)
    kl, losses, top = np.empty(shape), np.empty((*shape, 2)), np.empty((*shape, 2), np.int32)
    models = (model, reference)
    sessions = [each.session() for each in models]
    rows_at_once = max(1, _rows_at_once(model) // 4)
    for index, part in enumerate(parts):
        done = 0
        for session in sessions:
            session.reset()
        both = [_scored(session, part, rows_at_once) for session in sessions]
        for (rows, targets), (reference_rows, _) in zip(*both, strict=True):
            for row in zip(rows, reference_rows, targets, strict=True):
                at = (index, done)
                top[at] = row[0].argmax(), row[1].argmax()
                kl[at], losses[at] = _divergence(*row)
                done += 1
        if progress is not None:
            progress(index + 1, len(parts))
    seconds = time.perf_counter() - begun
    # Rounding can take it below zero, where it never is.
    kl = np.maximum(kl, 0.0)
    median, p99, p999 = np.quantile(kl, [0.5, 0.99, 0.999])
    return Comparison(
        perplexity=_perplexity(losses[..., 0], Timings()),
        reference=_perplexity(losses[..., 1], Timings()),
        mean_kl=float(kl.mean()),
        median_kl=float(median),
        p99_kl=float(p99),
        p999_kl=float(p999),
        max_kl=float(kl.max()),
        same_top=float((top[..., 0] == top[..., 1]).mean()),
        windows=len(parts),
        scored=kl.size,
        worst=_worst_tokens(parts, kl, top, worst, text),
        usage=Usage(prompt_tokens=parts.size),
        timings=Timings(prefill_s=seconds, prefill_tokens=kl.size),
    )


def _divergence(
    row: NDArray[np.float32], reference: NDArray[np.float32], target: np.int32
) -> tuple[float, tuple[float, float]]:
    """KL(reference || model) of two rows of logits, and the losses of model and reference.

    float32 [vocab] each. Exponentials are float32, their sums float64. The logits are counted
    from the largest of their row, where float32 is finest: the likely tokens make the sum.
    """
    logits, expected = row - row.max(), reference - reference.max()
    loss, expected_loss = -float(logits[target]), -float(expected[target])
    difference = expected - logits
    log_sum = math.log(np.exp(logits, out=logits).sum(dtype=np.float64))
    p = np.exp(expected, out=expected)
    total = float(p.sum(dtype=np.float64))
    mean = float(np.multiply(p, difference, out=p).sum(dtype=np.float64)) / total
    expected_log_sum = math.log(total)
    kl = mean + log_sum - expected_log_sum
    return kl, (loss + log_sum, expected_loss + expected_log_sum)


# How much of the text before a token is shown.
_BEFORE_TOKENS, _BEFORE_CHARACTERS = 32, 60


def _worst_tokens(
    parts: NDArray[np.int32],
    kl: NDArray[np.float64],
    top: NDArray[np.int32],
    count: int,
    text: Callable[[NDArray[np.int32]], str],
) -> list[WorstToken]:
    worst = []
    count = min(count, int(np.count_nonzero(kl)))
    for flat in np.argsort(-kl, axis=None, kind="stable")[:count]:
        index, column = divmod(int(flat), kl.shape[1])
        part, token = parts[index], column + 1
        worst.append(
            WorstToken(
                position=index * parts.shape[1] + token,
                before=text(part[max(0, token - _BEFORE_TOKENS) : token])[-_BEFORE_CHARACTERS:],
                token=text(part[token : token + 1]),
                kl=float(kl[index, column]),
                likeliest=text(top[index, column, :1]),
                reference_likeliest=text(top[index, column, 1:]),
            )
        )
    return worst


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
    session: _native.Session, tokens: NDArray[np.int32], rows_at_once: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Feed all tokens but the last; yield rows of logits with the tokens that follow them."""
    done = 0
    for piece in pieces(tokens[:-1], rows_at_once):
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
