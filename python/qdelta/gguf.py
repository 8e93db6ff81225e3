"""The tokenizer inside a GGUF file, read as the files that checkpoints have, and written.

The metadata holds tokens with their types and merges, which become vocab.json, merges.txt and the
added tokens of tokenizer_config.json. That the tokenizer composes characters (NFC) is not written
there; it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from . import vocabulary
from .errors import FileError, UnsupportedError

TYPES = ("BF16", "Q8_0", "Q4_0", "F16", "F32")

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


def metadata(files: Mapping[str, bytes], *, name: str, vocab_size: int) -> list[tuple[str, Any]]:
    """Metadata of a GGUF file beside that of the architecture.

    files: contents by name of the tokenizer's files; name: of the model; vocab_size: rows of the
    embedding, of which those without a token are called [PADn]. Raises FileError or
    UnsupportedError.
    """
    found = vocabulary.build(files)
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, id in found.bpe.get_vocab(with_added_tokens=False).items():
        tokens[id], types[id] = text, _NORMAL
    for id, token in found.added.items():
        tokens[id], types[id] = token.text, _CONTROL if token.special else _USER_DEFINED
    entries: list[tuple[str, Any]] = [
        ("general.type", "model"),
        ("general.name", name),
        ("general.license", "apache-2.0"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", _PRE_TOKENIZERS[0]),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", types),
        ("tokenizer.ggml.merges", _merges(found)),
        ("tokenizer.ggml.add_bos_token", False),
    ]
    ids = {text: id for id, text in enumerate(tokens)}
    for key, token_name in (("eos", "eos_token"), ("padding", "pad_token")):
        named = found.named_tokens.get(token_name)
        if named in ids:
            entries.append((f"tokenizer.ggml.{key}_token_id", ids[named]))
    if found.chat_template is not None:
        entries.append(("tokenizer.chat_template", found.chat_template))
    stated = vocabulary.parse_json(files, "generation_config.json")
    for key, wanted in _SAMPLING.items():
        value = stated.get(wanted)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = int(value) if key == "top_k" else float(value)
            entries.append((f"general.sampling.{key}", number))
    return entries


def _merges(found: vocabulary.Vocabulary) -> list[str]:
    """Merges in the order of their rank, "left right" each."""
    merges = json.loads(found.bpe.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
