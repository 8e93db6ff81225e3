"""Reading a tokenizer's files: vocabulary, merges, added tokens, chat template.

Two forms exist: `tokenizer.json`, or `vocab.json` with `merges.txt`. Added tokens stand in
tokenizer.json and in the `added_tokens_decoder` of tokenizer_config.json; either may have some
that the other lacks, so both are read and joined by id. The byte-level BPE itself is `_native`'s;
it gets only what lies between added tokens.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileAccessError, FileError, UnsupportedError

if TYPE_CHECKING:
    from . import _native

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# Letters keep their marks (\p{M}); the Qwen2 pattern, which does not, gives other ids for Thai,
# Hindi, Arabic and all decomposed text, although tokenizer_class may name that family.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text as a whole, before any splitting."""

    id: int
    text: str
    special: bool  # dropped by decode(skip_special=True)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as its files state it."""

    encoder: _native.Encoder  # NFC, splitting, BPE; knows no added tokens
    added: dict[int, AddedToken]
    size: int  # largest id + 1
    chat_template: str | None
    named_tokens: dict[str, str]  # "eos_token", ... -> text
    config: dict[str, Any]  # tokenizer_config.json


def read_folder(folder: Path) -> dict[str, bytes]:
    """Those of TOKENIZER_FILES that `folder` has. Raises FileAccessError."""
    files = {}
    for name in TOKENIZER_FILES:
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FileAccessError(error.errno, error.strerror, str(folder / name)) from error
    return files


def parse_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in file `name`, empty if there is none. Raises FileError."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{name}: an object expected, found {type(value).__name__}")
    return value


def build(files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary that `files` (name -> content) describe.

    Raises FileError for damaged or missing files, UnsupportedError for a tokenizer of another
    kind than byte-level BPE with exactly matched added tokens.
    """
    from . import _native

    config = parse_json(files, "tokenizer_config.json")
    added: dict[int, AddedToken] = {}
    if "tokenizer.json" in files:
        encoder, stated = _native.Encoder.from_tokenizer_json(files["tokenizer.json"])
        for id, text, special, exact in stated:
            _check_exact("tokenizer.json", text, exact)
            added[id] = AddedToken(id, text, special)
    elif "vocab.json" in files and "merges.txt" in files:
        encoder = _from_vocab_and_merges(files, config)
    else:
        raise FileError(
            "tokenizer.json: missing, and there are no vocab.json and merges.txt; the folder needs "
            "them beside the weights"
        )
    for token in _added_in_config(config):
        known = added.setdefault(token.id, token)
        if known.text != token.text:
            raise FileError(
                f"tokenizer_config.json: added token {token.id} is {reprlib.repr(token.text)}, "
                f"in tokenizer.json it is {reprlib.repr(known.text)}"
            )
    texts = [token.text for token in added.values()]
    if len(set(texts)) != len(texts):
        raise FileError("tokenizer_config.json: two added tokens share one text")
    return Vocabulary(
        encoder=encoder,
        added=added,
        size=max([encoder.size, *(id + 1 for id in added)]),
        chat_template=_chat_template(files, config),
        named_tokens=dict(_named_tokens(config)),
        config=config,
    )


def _from_vocab_and_merges(
    files: Mapping[str, bytes], config: Mapping[str, Any]
) -> _native.Encoder:
    from . import _native

    vocab = parse_json(files, "vocab.json")
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < 2**31:
            entry, its_id = reprlib.repr(text), reprlib.repr(id)
            raise FileError(f"vocab.json: entry {entry} has the id {its_id}")
    try:
        lines = files["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise FileError(f"merges.txt: not valid UTF-8: {error}") from error
    if lines[0].startswith("#version"):
        lines[0] = ""
    for number, line in enumerate(lines, 1):
        if line and line.count(" ") != 1:
            found = line.count(" ") + 1
            raise FileError(f"merges.txt:{number}: two tokens expected, found {found}")
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    pattern = config.get("pretokenize_regex") or PRE_TOKENIZER
    if not isinstance(pattern, str):
        raise FileError("tokenizer_config.json: pretokenize_regex is no text")
    return _native.Encoder.from_vocab_and_merges(vocab, merges, pattern)


def _added_in_config(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    file_name = "tokenizer_config.json"
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise FileError(f"{file_name}: added_tokens_decoder is not an object")
    for key, entry in entries.items():
        text: Any = entry.get("content") if isinstance(entry, dict) else None
        usable = re.fullmatch("[0-9]{1,9}", key) and isinstance(text, str) and text
        if not usable or re.search("[\ud800-\udfff]", text):
            found = reprlib.repr(key)
            raise FileError(f"{file_name}: added_tokens_decoder entry {found} is malformed")
        flags = [entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")]
        _check_exact(file_name, text, not any(flags))
        yield AddedToken(int(key), text, bool(entry.get("special")))


def _check_exact(file_name: str, text: str, exact: bool) -> None:
    if not exact:
        raise UnsupportedError(
            f"{file_name}: added token {reprlib.repr(text)} sets lstrip, rstrip or single_word; "
            "only exact matching is supported"
        )


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"chat_template.jinja: not valid UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise FileError("tokenizer_config.json: chat_template is neither text nor a list of texts")
    return template


def _named_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            yield name, value
