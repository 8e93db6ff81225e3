"""Which GGUF models a repository holds, told by the names of its files.

A file is named after its weights' type, `Qwen3.5-4B-Q4_K_M.gguf`, and may be one of several parts,
`...-Q4_K_M-00001-of-00002.gguf`, in the root or in a sub-folder. What the file really holds is
for its reader to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ArgumentError

SUFFIX = ".gguf"

_PART = re.compile(r"-(\d{5})-of-(\d{5})$", re.ASCII)
_TYPE = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4\w*))$",
    re.ASCII | re.IGNORECASE,
)
# The picture tower and the drafting layers, which are no models of their own.
_COMPANION = re.compile(r"(?:^|[-._])(?:mmproj|mtp)(?:[-._]|$)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file, or all parts of one."""

    stem: str  # path in the repository, without the number of the part and the suffix
    type: str  # as the name says it, "Q4_K_M" or "UD-Q4_K_XL"; else the name itself
    files: tuple[str, ...]  # paths in the repository, the first part first
    bytes: int
    parts: int  # as many as the names promise

    @property
    def whole(self) -> bool:
        return len(self.files) == self.parts


def models(files: Mapping[str, int]) -> list[GgufModel]:
    """The GGUF models among `files` (path -> bytes), smallest first."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in sorted(files):
        name = path.rpartition("/")[2]
        if not name.lower().endswith(SUFFIX) or _COMPANION.search(name[: -len(SUFFIX)]):
            continue
        stem = path[: -len(SUFFIX)]
        part = _PART.search(stem)
        key = (stem[: part.start()], int(part[2])) if part else (stem, 1)
        groups.setdefault(key, []).append(path)
    found = []
    for (stem, parts), paths in groups.items():
        name = stem.rpartition("/")[2]
        match = _TYPE.search(name)
        type = match[1].upper() if match else name
        size = sum(files[path] for path in paths)
        found.append(GgufModel(stem, type, tuple(paths), size, parts))
    return sorted(found, key=lambda model: (model.bytes, model.files))


def choose(files: Mapping[str, int], wanted: str, repo: str) -> GgufModel:
    """The one model among `files` that `wanted` names: a type or a stem, in any case.

    Raises ArgumentError, with a list of what there is, if none or several are meant; and if parts
    are missing.
    """
    model = find(files, wanted, repo)
    if not model.whole:
        raise ArgumentError(
            f"{repo}: {wanted!r} has {len(model.files)} of its {model.parts} parts, "
            f"as {model.files[0]}"
        )
    return model


def find(files: Mapping[str, int], wanted: str, repo: str) -> GgufModel:
    """The same, whether all parts are there or not."""
    there = models(files)
    asked = wanted.lower()

    found = [model for model in there if asked in (model.type.lower(), model.stem.lower())]
    if not found:  # "Q4_K_XL" is clear where there is "UD-Q4_K_XL" alone
        found = [model for model in there if model.type.lower() == f"ud-{asked}"]
    if len(found) != 1:
        what = "several files are of the type" if found else "no GGUF file of the type"
        raise ArgumentError(f"{repo}: {what} {wanted!r}; {listing(repo, found or there)}")
    return found[0]


def labels(there: list[GgufModel]) -> list[str]:
    """What one writes after the colon to mean each: the type, or the stem where types repeat."""
    types = [model.type for model in there]
    return [m.type if types.count(m.type) == 1 else m.stem for m in there]


def listing(repo: str, there: list[GgufModel]) -> str:
    """What one can ask for, in words."""
    if not there:
        return "it has no GGUF files"
    names = labels(there)
    sizes = (f"{name} ({m.bytes / 2**30:.2f} GiB)" for name, m in zip(names, there, strict=True))
    return f"name one, as {repo}:{names[0]}; there are: {', '.join(sizes)}"
