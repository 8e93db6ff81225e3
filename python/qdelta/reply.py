"""Taking generated text apart: reasoning from answer, and stop strings out of it.

Both work on text as it arrives, in pieces of any size, and give the same result for every way
of cutting it; what cannot be decided yet is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

_OPEN = "<think>"
_CLOSE = "</think>"

Part = tuple[Literal["reasoning", "text"], str]


class ReasoningSplitter:
    """Tells the think block from the answer.

    opened: the prompt ends inside a think block, so the text begins with reasoning. A repeated
    opening tag at its start is dropped, and so is white space around the closing one. Reasoning
    that never closes stays reasoning. Where the text begins with the answer, or after the block,
    one closing tag that has nothing to close is dropped if it comes first.
    """

    def __init__(self, opened: bool) -> None:
        self.in_reasoning = opened
        self._held = ""
        self._at_start = True  # of the reasoning, or of the answer
        self._skipping = False  # white space after a tag

    def push(self, text: str) -> list[Part]:
        """Parts that `text` makes certain, in order, none empty."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, when nothing more will come."""
        held, self._held = self._held, ""
        if not held or self._skipping:
            return []
        return [("reasoning" if self.in_reasoning else "text", held)]

    def _step(self, parts: list[Part]) -> bool:
        """Settle something about the held text; False if it takes more text to do so."""
        if self._skipping:
            self._held = self._held.lstrip()
            self._skipping = not self._held
            return bool(self._held)
        if self._at_start:
            return self._step_at_start()
        if not self.in_reasoning:
            if self._held:
                parts.append(("text", self._held))
            self._held = ""
            return False
        reasoning, close, rest = self._held.partition(_CLOSE)
        if close:
            self._held = rest
            self.in_reasoning = False
            self._at_start = self._skipping = True
        else:
            # A tag may have begun, and white space before it would go with it.
            certain = len(reasoning) - _overlap(reasoning, _CLOSE)
            reasoning = reasoning[:certain]
            self._held = self._held[len(reasoning.rstrip()) :]
        if reasoning.rstrip():
            parts.append(("reasoning", reasoning.rstrip()))
        return bool(close)

    def _step_at_start(self) -> bool:
        tag = _OPEN if self.in_reasoning else _CLOSE
        begun = self._held.lstrip()
        if begun.startswith(tag):
            self._held = begun[len(tag) :]
            self._skipping = True
        elif tag.startswith(begun):
            return False
        self._at_start = False
        return True


class StopStrings:
    """Finds the first of several texts in a stream, across the pieces it arrives in.

    Of several matches the one that is complete first counts, of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = tuple(
            sorted({stop[:n] for stop in stops for n in range(1, len(stop))}, key=len, reverse=True)
        )
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain to come before any match; `found` tells whether there was one."""
        if not self._stops:
            return text
        text = self._held + text
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.found = True
            self._held = ""
            return text[: min(matches)[1]]
        held = 0
        if text.endswith(self._beginnings):
            held = next(len(begun) for begun in self._beginnings if text.endswith(begun))
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, when nothing more will come."""
        held, self._held = self._held, ""
        return held


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a think block."""
    return prompt.rstrip().endswith(_OPEN)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins, short of all of it."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
