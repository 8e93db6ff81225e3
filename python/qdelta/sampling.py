"""Choosing the next token from a row of logits.

Order: logit_bias, penalties, temperature, top_k, top_p, min_p, then one draw; with
order="temperature_last" the temperature comes after the filters. Penalties count generated
tokens only, never the prompt, and each is the one that vLLM and OpenAI define:

    repetition   l <- l / r where l > 0, l r elsewhere   (once generated or more)
    presence     l <- l - p                              (once generated or more)
    frequency    l <- l - f count

With top_k on, the core finds the k best entries of the row and only these reach Python, where
a few dozen numbers are handled faster as a list than as an array. Otherwise, or when
processors are given, the whole row comes over.
"""

from __future__ import annotations

import math
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .errors import ArgumentError, Error

if TYPE_CHECKING:
    from numpy.typing import NDArray

# (ids, row) -> row: ids int32 [n], prompt and generated tokens so far; row float32 [vocab],
# free to be changed in place. Runs before everything else.
Processor = Callable[["NDArray[np.int32]", "NDArray[np.float32]"], "NDArray[np.float32]"]

Order = Literal["temperature_first", "temperature_last"]

# Above this many candidates numpy on the whole row is the faster way.
_MAX_LISTED = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults sample from the model's own distribution.

    Raises ArgumentError for values outside the ranges given below.
    """

    temperature: float = 1.0  # 0 and more; 0 always takes the most likely token
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0  # above 0, up to 1
    min_p: float = 0.0  # 0 to 1, relative to the most likely token
    presence_penalty: float = 0.0  # -2 to 2
    frequency_penalty: float = 0.0  # -2 to 2
    repetition_penalty: float = 1.0  # above 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added logit
    seed: int | None = None  # None: different each time
    order: Order = "temperature_first"

    def __post_init__(self) -> None:
        self._check_number("temperature", 0.0, math.inf)
        self._check_number("top_p", 0.0, 1.0, above=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("repetition_penalty", 0.0, math.inf, above=True)
        self._check_integer("top_k", -1)
        if self.seed is not None:
            self._check_integer("seed", 0)
        if self.order not in ("temperature_first", "temperature_last"):
            found = reprlib.repr(self.order)
            raise ArgumentError(
                f'order: "temperature_first" or "temperature_last" expected, got {found}'
            )
        object.__setattr__(self, "logit_bias", _check_bias(self.logit_bias))

    def _check_number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ArgumentError(f"{name}: a number expected, got {reprlib.repr(value)}")
        number = _float(value)
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            first = f"above {low:g}" if above else f"{low:g} or more"
            last = "" if math.isinf(high) else f", {high:g} or less"
            raise ArgumentError(f"{name}: {first}{last} expected, got {number:g}")
        object.__setattr__(self, name, number)

    def _check_integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            found = reprlib.repr(value)
            raise ArgumentError(f"{name}: an integer of {low} or more expected, got {found}")
        object.__setattr__(self, name, int(value))

    def but(self, **changes: Any) -> Sampling:
        """A copy with some fields changed."""
        return replace(self, **changes)


class LogitsSource(Protocol):
    """What a sampler needs of a session: its last row of logits, whole or in part."""

    def logits(self) -> NDArray[np.float32]: ...
    def gather(self, ids: NDArray[np.int32]) -> NDArray[np.float32]: ...
    def candidates(
        self, k: int, *, limit: int, ids: NDArray[np.int32], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...


class Sampler:
    """One generation's choices: parameters, random numbers, counts of generated tokens.

    limit: ids from here on are never chosen (rows of the vocabulary that pad it and have no
    text). prompt: only shown to `processors`.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        limit: int,
        prompt: Sequence[int] = (),
        processors: Sequence[Processor] = (),
    ) -> None:
        beyond = [id for id in sampling.logit_bias if id >= limit]
        if beyond:
            raise ArgumentError(f"logit_bias: token {beyond[0]}, the vocabulary has {limit}")
        self._sampling = sampling
        self._limit = limit
        self._processors = tuple(processors)
        self._greedy = sampling.temperature == 0.0
        self._penalised = (
            sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or sampling.repetition_penalty != 1.0
        )
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._tokens = np.array(prompt, np.int32) if processors else np.empty(0, np.int32)
        self._n_tokens = len(self._tokens)
        self._changed = _ChangedEntries(sampling.logit_bias)

    def choose(self, source: LogitsSource) -> int:
        """The next token id, given the source's last row; it counts as generated from now on."""
        sampling = self._sampling
        k = 1 if self._greedy else sampling.top_k
        if 0 < k <= _MAX_LISTED and not self._processors:
            ids, values = source.candidates(
                k, limit=self._limit, **self._changed.entries(sampling, source.gather)
            )
            token = self._choose_listed(ids.tolist(), values.tolist())
        else:
            token = self._choose_from_row(source.logits()[-1])
        if self._penalised:
            self._changed.count(token)
        if self._processors:
            self._note(token)
        return token

    def _choose_listed(self, ids: list[int], logits: list[float]) -> int:
        """Choose among candidates, largest logit first."""
        best = logits[0]
        if not math.isfinite(best):
            raise _not_finite(best)
        if self._greedy:
            return ids[0]
        sampling = self._sampling
        scale, filtered_at = _scales(sampling)
        weights = [math.exp((logit - best) * filtered_at) for logit in logits]
        sums = list(accumulate(weights))
        n = len(sums)
        if sampling.top_p < 1.0:
            n = min(n, bisect_left(sums, sampling.top_p * sums[-1]) + 1)
        if sampling.min_p > 0.0:  # weights are relative to the largest, which is 1
            while weights[n - 1] < sampling.min_p:
                n -= 1
        if filtered_at != scale:
            sums = list(accumulate(math.exp((logit - best) * scale) for logit in logits[:n]))
        return ids[bisect_right(sums, self._random.random() * sums[n - 1], 0, n)]

    def _choose_from_row(self, row: NDArray[np.float32]) -> int:
        """Choose from a whole row, float32 [vocab]; the row may be changed."""
        for processor in self._processors:
            result = np.asarray(processor(self._tokens[: self._n_tokens], row), np.float32)
            if result.shape != row.shape:
                raise ArgumentError(
                    f"processors: a row of shape {row.shape} expected, got {result.shape}"
                )
            row = result if result.flags.writeable else result.copy()
        row = row[: self._limit]
        changed = self._changed.entries(self._sampling, lambda ids: row[ids])
        row[changed["ids"]] = changed["values"]
        best = float(row.max())
        if not math.isfinite(best):
            raise _not_finite(best)
        if self._greedy:
            return int(row.argmax())
        sampling = self._sampling
        k = min(sampling.top_k, len(row))
        if 0 < k <= _MAX_LISTED:
            best_ids = top_k(row, k)
            return self._choose_listed(best_ids.tolist(), row[best_ids].tolist())
        ids = top_k(row, k) if k > 0 else None
        below = (row if ids is None else row[ids]) - np.float32(best)
        scale, filtered_at = map(np.float32, _scales(sampling))
        weights = np.exp(below * filtered_at)
        if sampling.top_p < 1.0 or sampling.min_p > 0.0:
            kept = nucleus(weights, sampling.top_p, sampling.min_p)
            ids = kept if ids is None else ids[kept]
            below, weights = below[kept], weights[kept]
        if filtered_at != scale:
            weights = np.exp(below * scale)
        sums = weights.cumsum(dtype=np.float64)
        place = sums.searchsorted(self._random.random() * sums[-1], side="right")
        return int(place if ids is None else ids[place])

    def _note(self, token: int) -> None:
        if self._n_tokens == len(self._tokens):
            self._tokens = np.resize(self._tokens, max(256, 2 * self._n_tokens))
        self._tokens[self._n_tokens] = token
        self._n_tokens += 1


class _ChangedEntries:
    """Entries of a row that bias or penalties change: ids in order of arrival, with counts."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._place = {id: place for place, id in enumerate(bias)}
        self._ids = np.zeros(max(64, 2 * len(bias)), np.int32)
        self._counts = np.zeros(len(self._ids), np.float32)
        self._bias = np.zeros(len(self._ids), np.float32)
        self._n = len(bias)
        self._ids[: self._n] = list(bias.keys())
        self._bias[: self._n] = list(bias.values())

    def count(self, id: int) -> None:
        """Note that `id` was generated."""
        place = self._place.get(id)
        if place is None:
            place = self._n
            if place == len(self._ids):
                self._ids, self._counts, self._bias = (
                    np.concatenate([array, np.zeros_like(array)])
                    for array in (self._ids, self._counts, self._bias)
                )
            self._ids[place] = id
            self._place[id] = place
            self._n += 1
        self._counts[place] += 1

    def entries(
        self, sampling: Sampling, gather: Callable[[NDArray[np.int32]], NDArray[np.float32]]
    ) -> dict[str, Any]:
        """The changed entries: {"ids": int32 [n], "values": float32 [n]}."""
        n = self._n
        ids = self._ids[:n]
        if n == 0:
            return {"ids": ids, "values": self._bias[:0]}
        values = gather(ids) + self._bias[:n]
        counts = self._counts[:n]
        if sampling.repetition_penalty != 1.0:
            factor = np.float32(sampling.repetition_penalty)
            penalised = np.where(values > 0, values / factor, values * factor)
            values = np.where(counts > 0, penalised, values)
        if sampling.presence_penalty != 0.0:
            values -= np.float32(sampling.presence_penalty) * (counts > 0)
        if sampling.frequency_penalty != 0.0:
            values -= np.float32(sampling.frequency_penalty) * counts
        return {"ids": ids, "values": values}


def top_k(row: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Positions of the `k` largest entries, largest first; of equal ones the first first.

    row: float32 [n].
    """
    threshold = np.partition(row, len(row) - k)[len(row) - k]
    ids = np.flatnonzero(row >= threshold)
    return ids[np.argsort(-row[ids], kind="stable")][:k]


def nucleus(weights: NDArray[np.float32], top_p: float, min_p: float) -> NDArray[np.intp]:
    """Positions of the entries that top_p, then min_p keep, in their order; at least one.

    weights: float32 [n], probabilities relative to the largest, which is 1. top_p keeps the fewest
    that reach it together, largest first and of equal ones the first first.
    """
    if top_p == 1.0:
        return np.flatnonzero(weights >= min_p)
    # Sums of whole numbers are the same in any order. All together have 62 bits.
    shares = (weights * np.float32(2.0 ** (62 - len(weights).bit_length()))).astype(np.int64)
    ids = _largest(shares, math.ceil(Fraction(top_p) * int(shares.sum())))
    return ids[weights[ids] >= min_p]


def _largest(shares: NDArray[np.int64], target: int) -> NDArray[np.intp]:
    """Positions, in order, of the fewest that reach `target`, chosen as `nucleus` says.

    shares: int64 [n], 0 and more. target: 1 up to their sum. Sorting all would cost as much as a
    step of a small model; halves tell where the last one is.
    """
    most = shares.max()
    for bits in range(8, 63, 9):  # few are large, for rows of a model are steep; 62: all
        ids = np.flatnonzero(shares >= most >> bits)
        candidates = shares[ids]
        if candidates.sum() >= target:
            break
    rest, before = candidates, 0
    while len(rest) > 1:
        middle = len(rest) // 2
        rest = np.partition(rest, middle)
        upper = int(rest[middle:].sum())
        if before + upper >= target:
            rest = rest[middle:]
        else:
            before += upper
            rest = rest[:middle]
    last = int(rest[0])
    kept = candidates > last
    missing = target - int(candidates[kept].sum())
    kept[np.flatnonzero(candidates == last)[: -(-missing // last)]] = True
    return ids[kept]


def _scales(sampling: Sampling) -> tuple[float, float]:
    """What logits are multiplied by for the draw, and for the filters before it."""
    scale = min(1.0 / sampling.temperature, 1e30)  # colder is the same, and infinite is no number
    return scale, scale if sampling.order == "temperature_first" else 1.0


def _not_finite(best: float) -> Error:
    if best == -math.inf:
        return ArgumentError("logit_bias, processors: no token is left to choose from")
    return Error(f"the model's largest logit is {best}; its weights or state are damaged")


def _check_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ArgumentError(f"logit_bias: a mapping expected, got {type(bias).__name__}")
    checked = {}
    for key, value in bias.items():
        if isinstance(key, str) and key.isdecimal():  # JSON has no other keys
            key = int(key)
        if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < 2**31:
            raise ArgumentError(f"logit_bias: token ids expected as keys, got {reprlib.repr(key)}")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or math.isnan(number := _float(value))
            or number == math.inf
        ):
            found = reprlib.repr(value)
            raise ArgumentError(f"logit_bias: a number below infinity expected, got {found}")
        checked[int(key)] = number
    return checked


def _float(value: Any) -> float:
    """A number as a float; infinite if it is larger than any."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
