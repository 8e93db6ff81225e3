"""Sampling that the model cards recommend, by size and mode.

The published generation_config.json files have one profile each and lack presence_penalty, so
they are used only for models without a table here. On every card min_p is 0 and
repetition_penalty 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .errors import ArgumentError, FileError
from .sampling import Sampling


def _row(temperature: float, top_p: float, top_k: int, presence_penalty: float) -> Sampling:
    return Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, presence_penalty=presence_penalty
    )


# Modes: "chat" answers at once, "thinking" reasons first; "coding" is precise work with
# thinking, "reasoning" hard questions without it; "vision" goes with pictures.
_SMALL = {
    "chat": _row(1.0, 1.0, 20, 2.0),
    "thinking": _row(1.0, 0.95, 20, 1.5),
    "coding": _row(0.6, 0.95, 20, 0.0),
    "vision": _row(0.7, 0.8, 20, 1.5),
    "vision-thinking": _row(0.6, 0.95, 20, 0.0),
}
# The cards of these sizes state "reasoning" twice with different numbers; these are from the
# list of best practices.
_LARGE = {
    "chat": _row(0.7, 0.8, 20, 1.5),
    "thinking": _row(1.0, 0.95, 20, 1.5),
    "coding": _row(0.6, 0.95, 20, 0.0),
    "reasoning": _row(1.0, 1.0, 40, 2.0),
}

# (hidden_size, num_hidden_layers) -> profiles
_CARDS = {
    (1024, 24): _SMALL,  # 0.8B
    (2048, 24): _SMALL,  # 2B
    (2560, 32): _LARGE,  # 4B
    (4096, 32): _LARGE,  # 9B
}

_FROM_FILE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")


def profiles(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> dict[str, Sampling]:
    """Profiles of a model by name.

    config: config.json. A model without a card gets the values of generation_config.json as
    "chat" and "thinking", or the 4B card if that file has none. "checkpoint" is always what the
    file says, where it says anything; "greedy" takes the most likely token.
    """
    text = config.get("text_config", config)
    card = _CARDS.get((text.get("hidden_size"), text.get("num_hidden_layers")))
    stated = _stated(generation_config)
    if card is not None:
        found = dict(card)
    elif stated is not None:
        found = {"chat": stated, "thinking": stated}
    else:
        found = dict(_LARGE)
    if stated is not None:
        found["checkpoint"] = stated
    found["greedy"] = Sampling(temperature=0.0)
    return found


def pick(found: Mapping[str, Sampling], name: str, *, thinking: bool) -> Sampling:
    """The profile `name`; "auto" is "thinking" or "chat". Raises ArgumentError if unknown."""
    if name == "auto":
        name = "thinking" if thinking else "chat"
    if name not in found:
        near = difflib.get_close_matches(str(name), found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            f"preset: this model has no profile {name!r}{hint} (it has {', '.join(sorted(found))})"
        )
    return found[name]


def _stated(generation_config: Mapping[str, Any]) -> Sampling | None:
    values = {
        name: generation_config[name]
        for name in _FROM_FILE
        if generation_config.get(name) is not None
    }
    try:
        if generation_config.get("do_sample") is False:
            return Sampling(temperature=0.0)
        return Sampling(**values) if values else None
    except ArgumentError as error:
        raise FileError(f"generation_config.json: {error}") from error
