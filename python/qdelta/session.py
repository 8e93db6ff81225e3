"""One timeline of tokens: what was fed, what comes next.

A session belongs to one conversation. Any number of them share a model, and threads may use
different sessions at once; two calls on the same session wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from .errors import ArgumentError, ContextError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _native

# Prompts are fed in pieces of this many tokens: between two of them the interpreter can react
# to Ctrl-C, a timeout or a cancel. Larger pieces would not be faster.
PREFILL_CHUNK = 512


class Session:
    """A timeline on a model; made by `Model.session`."""

    def __init__(self, native: _native.Session, *, context: int) -> None:
        self._native = native
        self.context = context  # tokens that it can hold

    @overload
    def feed(
        self, ids: Iterable[int], *, logits: Literal["last", "all"] = "last"
    ) -> NDArray[np.float32]: ...

    @overload
    def feed(self, ids: Iterable[int], *, logits: Literal["none"]) -> None: ...

    def feed(
        self, ids: Iterable[int], *, logits: Literal["last", "all", "none"] = "last"
    ) -> NDArray[np.float32] | None:
        """Append tokens; return the logits that follow.

        ids: at least one token id. logits: "last", float32 [vocab] after the last token; "all",
        float32 [tokens, vocab]; "none", None, which is cheaper. Raises ContextError if the
        context cannot hold them, MemoryLimitError if the model's limit cannot, ArgumentError for
        ids outside the vocabulary; nothing changes then.
        """
        tokens = token_array(ids)
        if not len(tokens):
            raise ArgumentError("ids: empty; at least one token is needed")
        if logits not in ("last", "all", "none"):
            raise ArgumentError(f'logits: "last", "all" or "none" expected, got {logits!r}')
        self._check_room(len(tokens))
        if logits == "all":
            rows = []
            for piece in pieces(tokens):
                self._native.feed(piece, "all")
                rows.append(self._native.logits())
            return np.concatenate(rows)
        feed_prompt(self._native, tokens, last=logits)
        return None if logits == "none" else self._native.logits()[-1]

    def _check_room(self, n: int) -> None:
        needed = self._native.n_tokens + n
        if needed > self.context:
            raise ContextError(needed, self.context)

    @property
    def tokens(self) -> list[int]:
        """All token ids fed so far."""
        return [int(id) for id in self._native.tokens()]

    @property
    def n_tokens(self) -> int:
        return self._native.n_tokens

    def snapshot(self) -> _native.Snapshot:
        """The exact state, to `restore` any number of times; `.n_tokens` and `.nbytes` tell size.

        There is no other way back: a recurrent state cannot be cut to a shorter timeline. Raises
        MemoryLimitError if the model's limit leaves no room for it.
        """
        return self._native.snapshot()

    def restore(self, snapshot: _native.Snapshot) -> None:
        """Return to the state of a snapshot of a session of the same model."""
        self._native.restore(snapshot)

    def reset(self) -> None:
        """Return to an empty timeline."""
        self._native.reset()

    def __len__(self) -> int:
        return self._native.n_tokens


def token_array(ids: Any) -> NDArray[np.int32]:
    """Token ids as int32 [n]. Raises ArgumentError for anything but a list of ids >= 0."""
    try:
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"ids: a list of token ids expected: {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ArgumentError(
            f"ids: a list of token ids expected, got {array.dtype} of shape {array.shape}"
        )
    if int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise ArgumentError(
            f"ids: token ids of 0 and more expected, got {array.min()} to {array.max()}"
        )
    return np.ascontiguousarray(array, np.int32)


def pieces(tokens: NDArray[np.int32], size: int = PREFILL_CHUNK) -> Iterable[NDArray[np.int32]]:
    """Consecutive parts of at most `size` tokens."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


def feed_prompt(
    native: _native.Session,
    tokens: NDArray[np.int32],
    *,
    last: str = "last",
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Feed tokens piece by piece, asking `go_on` before each; whether all were fed.

    last: which logits the final piece keeps.
    """
    fed = 0
    for piece in pieces(tokens):
        if not go_on():
            return False
        fed += len(piece)
        native.feed(piece, last if fed == len(tokens) else "none")
    return True
