"""The tokenizer inside a GGUF file, as the files that checkpoints have.

The metadata holds tokens with their types and merges, which become vocab.json, merges.txt and the
added tokens of tokenizer_config.json. That the tokenizer composes characters (NFC) is not written
there; it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .errors import FileError, UnsupportedError

# Types of tokens; 2 (unknown) and 6 (byte) do not occur.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Names of pre-tokenizers. Files of older programs may state the family's before, or none; the
# architecture is known when this is read.
_PRE_TOKENIZERS = ("qwen35", "qwen2", None)
# Ends a document; generation_config.json of the models names it beside the end of a turn.
_END_OF_TEXT = "<|endoftext|>"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def tokenizer_files(get: Callable[[str], Any]) -> dict[str, bytes]:
    """Contents by name of the tokenizer files that the metadata describes.

    get: value of a key, None if the file has none. Raises FileError for metadata that is damaged
    or missing, UnsupportedError for another kind of tokenizer.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind is None:
        raise FileError("tokenizer.ggml.model: missing; the file carries no tokenizer")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"tokenizer.ggml.model is {kind!r}, tokenizer.ggml.pre {pre!r}; only byte-level BPE of "
            "Qwen3.5 ('gpt2', 'qwen35') is supported"
        )
    tokens = _strings(get, "tokenizer.ggml.tokens")
    merges = _strings(get, "tokenizer.ggml.merges")
    types = get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        count = len(types) if isinstance(types, list) else 0
        raise FileError(f"tokenizer.ggml.token_type: {count} entries, expected {len(tokens)}")
    vocab: dict[str, int] = {}
    added: dict[str, dict[str, Any]] = {}
    for id, (text, type) in enumerate(zip(tokens, types, strict=True)):
        if type == _NORMAL:
            if vocab.setdefault(text, id) != id:
                raise FileError(f"tokenizer.ggml.tokens: {text!r} is there twice")
        elif type in (_CONTROL, _USER_DEFINED):
            added[str(id)] = {"content": text, "special": type == _CONTROL}
        elif type != _UNUSED:
            raise FileError(f"tokenizer.ggml.token_type: token {id} has the unknown type {type!r}")

    config: dict[str, Any] = {"added_tokens_decoder": added}
    for name, key in (("eos_token", "eos"), ("bos_token", "bos"), ("pad_token", "padding")):
        named = _token_id(get, f"tokenizer.ggml.{key}_token_id", len(tokens))
        if named is not None:
            config[name] = tokens[named]
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(merges).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(_generation_config(get, tokens)).encode(),
    }
    template = get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise FileError("tokenizer.chat_template: no text")
        files["chat_template.jinja"] = template.encode()
    return files


def _strings(get: Callable[[str], Any], key: str) -> list[str]:
    values = get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        found = "missing" if values is None else "no list of texts"
        raise FileError(f"{key}: {found}")
    return values


def _token_id(get: Callable[[str], Any], key: str, count: int) -> int | None:
    id = get(key)
    if id is None:
        return None
    if type(id) is not int or not 0 <= id < count:
        raise FileError(f"{key} is {id!r}, expected a token id below {count}")
    return id


def _generation_config(get: Callable[[str], Any], tokens: list[str]) -> dict[str, Any]:
    ends = [_token_id(get, "tokenizer.ggml.eos_token_id", len(tokens))]
    if _END_OF_TEXT in tokens:
        ends.append(tokens.index(_END_OF_TEXT))
    config: dict[str, Any] = {"eos_token_id": sorted({id for id in ends if id is not None})}
    for key, name in _SAMPLING.items():
        value = get(f"general.sampling.{key}")
        if value is not None:
            config[name] = value
    return config
