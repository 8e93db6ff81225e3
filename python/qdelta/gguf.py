"""The tokenizer inside a GGUF file, read as the files that checkpoints have, and written.

The metadata holds tokens with their types and merges, which become vocab.json, merges.txt and the
added tokens of tokenizer_config.json. That the tokenizer composes characters (NFC) is not written
there; it does.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from . import vocabulary
from .errors import FileError, UnsupportedError

TYPES = ("BF16", "Q8_0", "Q4_0", "F16", "F32")

# Types of tokens; 2 (unknown) and 6 (byte) do not occur.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Names of pre-tokenizers. Files of older programs may state the family's before, or none; the
# architecture is known when this is read.
_PRE_TOKENIZERS = ("qwen35", "qwen2", None)
# Keys of tokens with a purpose, and their names in tokenizer_config.json.
_NAMED = {"eos": "eos_token", "bos": "bos_token", "padding": "pad_token"}
_MERGE = re.compile(r"[^ \r\n]+ [^ \r\n]+")
# Ends a document; generation_config.json of the models names it beside the end of a turn.
_END_OF_TEXT = "<|endoftext|>"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_WORDS = {str: "a text", int: "a whole number"}

_T = TypeVar("_T")


def tokenizer_files(get: Callable[[str], Any], file_name: str) -> dict[str, bytes]:
    """Contents by name of the tokenizer files that the metadata describes.

    get: value of a key, None if the file has none. file_name: what errors call the file. Raises
    FileError for metadata that is damaged or missing, UnsupportedError for another kind of
    tokenizer.
    """
    known = _Metadata(get, file_name)
    known.check_kind()
    tokens = known.values("tokenizer.ggml.tokens", str)
    types = known.values("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise known.error(
            "tokenizer.ggml.token_type", f"{len(types)} types of {len(tokens)} tokens"
        )
    config = {
        "added_tokens_decoder": _added_tokens(known, tokens, types),
        **{name: tokens[id] for name, id in known.named_tokens(len(tokens))},
    }
    files = {
        "vocab.json": _encoded(_ordinary_tokens(known, tokens, types)),
        # The comment keeps the first merge from being taken for one.
        "merges.txt": "\n".join(["#version: 0.2", *_merges_of(known)]).encode(),
        "tokenizer_config.json": _encoded(config),
        "generation_config.json": _encoded(_generation_config(known, tokens)),
    }
    template = known.value("tokenizer.chat_template", str)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Values by key; errors name the file and the key."""

    get: Callable[[str], Any]
    file_name: str

    def error(self, key: str, problem: str) -> FileError:
        return FileError(f"{self.file_name}: key `{key}`: {problem}")

    def value(self, key: str, kind: type[_T]) -> _T | None:
        value = self.get(key)
        if value is not None and type(value) is not kind:
            raise self.error(key, f"{_WORDS[kind]} expected, found {reprlib.repr(value)}")
        return value

    def values(self, key: str, kind: type[_T]) -> Sequence[_T]:
        values = self.get(key)
        if values is None:
            raise self.error(key, "missing")
        # The elements of a list are of one type; this is quick enough to look at all of them.
        if not isinstance(values, list) or not set(map(type, values)) <= {kind}:
            found = "another list" if isinstance(values, list) else reprlib.repr(values)
            raise self.error(key, f"a list expected, of {_WORDS[kind]} each, found {found}")
        return values

    def check_kind(self) -> None:
        """Raises unless this is byte-level BPE with the family's splitting of text."""
        kind, pre = (self.value(f"tokenizer.ggml.{key}", str) for key in ("model", "pre"))
        if kind is None:
            raise self.error("tokenizer.ggml.model", "missing; the file carries no tokenizer")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            raise UnsupportedError(
                f"{self.file_name}: tokenizer.ggml.model is {reprlib.repr(kind)}, "
                f"tokenizer.ggml.pre {reprlib.repr(pre)}; only byte-level BPE of Qwen3.5 ('gpt2', "
                "'qwen35') is supported"
            )

    def named_tokens(self, count: int) -> Iterator[tuple[str, int]]:
        """Name in tokenizer_config.json, and id below `count`, of tokens with a purpose."""
        for key, name in _NAMED.items():
            key = f"tokenizer.ggml.{key}_token_id"
            id = self.value(key, int)
            if id is not None and not 0 <= id < count:
                raise self.error(key, f"{id}, expected a token id below {count}")
            if id is not None:
                yield name, id


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _ordinary_tokens(
    known: _Metadata, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, int]:
    typed = enumerate(zip(tokens, types, strict=True))
    vocab = {text: id for id, (text, type) in typed if type == _NORMAL}
    if len(vocab) != types.count(_NORMAL):
        _raise_twice(known, (t for t, type in zip(tokens, types, strict=True) if type == _NORMAL))
    return vocab


def _added_tokens(
    known: _Metadata, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """As `added_tokens_decoder` has them."""
    added: dict[str, dict[str, Any]] = {}
    for id, type in enumerate(types):
        if type in (_CONTROL, _USER_DEFINED):
            if not tokens[id]:
                raise known.error("tokenizer.ggml.tokens", f"the added token {id} is empty")
            added[str(id)] = {"content": tokens[id], "special": type == _CONTROL}
        elif type not in (_NORMAL, _UNUSED):
            raise known.error("tokenizer.ggml.token_type", f"token {id} has the type {type}")
    texts = [token["content"] for token in added.values()]
    if len(set(texts)) != len(texts):
        _raise_twice(known, texts)
    return added


def _raise_twice(known: _Metadata, texts: Iterable[str]) -> NoReturn:
    (text, _), *_ = Counter(texts).most_common(1)
    raise known.error("tokenizer.ggml.tokens", f"{reprlib.repr(text)} is there twice")


def _merges_of(known: _Metadata) -> Sequence[str]:
    key = "tokenizer.ggml.merges"
    merges = known.values(key, str)
    wrong = next((i for i, merge in enumerate(merges) if not _MERGE.fullmatch(merge)), None)
    if wrong is not None:
        raise known.error(
            key, f"entry {wrong} is {reprlib.repr(merges[wrong])}, expected two tokens"
        )
    return merges


def _generation_config(known: _Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    ends = {id for name, id in known.named_tokens(len(tokens)) if name == "eos_token"}
    if _END_OF_TEXT in tokens:
        ends.add(tokens.index(_END_OF_TEXT))
    config: dict[str, Any] = {"eos_token_id": sorted(ends)}
    for key, name in _SAMPLING.items():
        value = known.get(f"general.sampling.{key}")
        if value is not None:
            # The decimal that was rounded to f32, 0.6 and not 0.6000000238.
            config[name] = float(f"{value:.7g}") if type(value) is float else value
    return config


def metadata(
    files: Mapping[str, bytes], *, name: str, licence: str | None, vocab_size: int
) -> list[tuple[str, Any]]:
    """Metadata of a GGUF file beside that of the architecture.

    files: contents by name of the tokenizer's files. name, licence: of the model. vocab_size: rows
    of the embedding, of which those without a token are called [PADn]. Raises FileError or
    UnsupportedError.
    """
    found = vocabulary.build(files)
    if found.size > vocab_size:
        raise FileError(
            f"tokenizer: {found.size} ids, the embedding has rows for {vocab_size} tokens"
        )
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, id in found.encoder.tokens().items():
        tokens[id], types[id] = text, _NORMAL
    for id, token in found.added.items():
        tokens[id], types[id] = token.text, _CONTROL if token.special else _USER_DEFINED
    entries: list[tuple[str, Any]] = [
        ("general.type", "model"),
        ("general.name", name),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", _PRE_TOKENIZERS[0]),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", types),
        ("tokenizer.ggml.merges", [" ".join(merge) for merge in found.encoder.merges()]),
        ("tokenizer.ggml.add_bos_token", False),
    ]
    ids = {text: id for id, text in enumerate(tokens)}
    for key, token_name in (("eos", "eos_token"), ("padding", "pad_token")):
        named = found.named_tokens.get(token_name)
        if named in ids:
            entries.append((f"tokenizer.ggml.{key}_token_id", ids[named]))
    if found.chat_template is not None:
        entries.append(("tokenizer.chat_template", found.chat_template))
    if licence is not None:
        entries.append(("general.license", licence))
    return entries + _sampling(vocabulary.parse_json(files, "generation_config.json"))


def _sampling(generation_config: Mapping[str, Any]) -> list[tuple[str, int | float]]:
    from . import profiles

    profiles.profiles({}, generation_config)  # raises FileError for what is no such value
    entries: list[tuple[str, int | float]] = []
    for key, name in _SAMPLING.items():
        value = generation_config.get(name)
        if value is not None:
            # -1 is off, too, but the file has no negative numbers; no vocabulary is that large.
            value = min(max(value, 0), 2**31 - 1) if name == "top_k" else float(value)
            entries.append((f"general.sampling.{key}", value))
    return entries
