"""Names of options as other programs spell them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any


def canonical(
    method: str, given: Mapping[str, Any], names: frozenset[str], synonyms: Mapping[str, str]
) -> dict[str, Any]:
    """`given` under its canonical names. Raises TypeError for unknown and repeated ones."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        known = synonyms.get(name, name)
        if known not in names:
            spellings = [*names, *(word for word, name in synonyms.items() if name in names)]
            near = difflib.get_close_matches(name, sorted(spellings), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{method}() got an unknown option {name!r}{hint}")
        if known in values:
            raise TypeError(f"{method}() got {known!r} twice, once under another name")
        values[known] = value
    return values
