"""Recipe files: which format each matrix of a model gets.

A line is a pattern and a format; the first pattern that matches a matrix counts, and the recipe
"balanced" decides about those that none matches:

    # comments and empty lines are fine
    embed_tokens                 w6_k
    layers.0.*                   w6_k|w8
    *.mlp.down_proj              w5_k
    *.linear_attn.in_proj_[ab]   keep

Names are those of checkpoints without `model.language_model.` and `.weight`. Formats:
w4_r, w4_nl_r, w5_r, w4_k, w5_k, w6_k, w4, w4_nl, w5_planes, w8, w8_planes, and keep for the
checkpoint's own numbers. The ones that end in r take rows of a multiple of 128 columns, the ones
that end in k of 256; of several formats the first that fits is taken.
"""

from __future__ import annotations

import fnmatch
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FileAccessError, FileError

if TYPE_CHECKING:
    from . import _native

NAMES = ("balanced", "small", "fine", "best")
FORMATS = (
    *("keep", "w4_r", "w4_nl_r", "w5_r", "w4_k", "w5_k", "w6_k"),
    *("w4", "w4_nl", "w5_planes", "w8", "w8_planes"),
)
_BLOCKS = {"r": 128, "k": 256}  # columns, by the end of a format's name


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of a recipe file."""

    place: str  # file and line, for errors
    pattern: str
    formats: list[str]


def read(path: str | Path) -> list[Rule]:
    """The rules of a recipe file. Raises FileError or FileAccessError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise FileAccessError(error.errno, error.strerror, str(path)) from error
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        place = f"{path}:{number}"
        if len(words) != 2:
            raise FileError(
                f"{place}: expected a pattern and a format, found {reprlib.repr(line.strip())}"
            )
        pattern, formats = words[0], words[1].split("|")
        for format in formats:
            if format not in FORMATS:
                raise FileError(
                    f"{place}: format {reprlib.repr(format)}, expected one of: {', '.join(FORMATS)}"
                )
        rules.append(Rule(place, pattern, formats))
    return rules


def formats(rules: list[Rule], source: _native.Checkpoint) -> dict[str, str]:
    """Formats by name of the matrices that a rule matches.

    Raises FileError for a rule that matches no matrix, or whose formats fit none.
    """
    chosen: dict[str, str] = {}
    matched = set()
    for name, _, cols in source.matrices():
        stem = name.removesuffix(".weight")
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(stem, rule.pattern)), None)
        if rule is None:
            continue
        matched.add(rule.place)
        blocks = [_BLOCKS.get(format.rpartition("_")[2], 1) for format in rule.formats]
        fits = [f for f, block in zip(rule.formats, blocks, strict=True) if cols % block == 0]
        if not fits:
            raise FileError(
                f"{rule.place}: {stem} has rows of {cols} columns, no multiple of {min(blocks)}; "
                "name another format after a |"
            )
        chosen[name] = fits[0]
    for rule in rules:
        if rule.place not in matched:
            raise FileError(
                f"{rule.place}: {reprlib.repr(rule.pattern)} matches no matrix, or an earlier line "
                "takes all that it matches"
            )
    return chosen
