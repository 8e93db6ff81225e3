"""The metadata of GGUF files as Python sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

import qdelta
from qdelta import _native


@pytest.fixture
def path(golden_folder: Path) -> Path:
    return golden_folder / "gguf" / "tiny-f32-F32.gguf"


def test_values(path):
    checkpoint = _native.Checkpoint(str(path))
    assert checkpoint.convention == "gguf"
    keys = checkpoint.gguf_keys()
    assert keys == sorted(set(keys)) and "qwen35.block_count" in keys
    assert all(checkpoint.gguf_value(key) is not None for key in keys)
    value = checkpoint.gguf_value
    assert value("none") is None
    assert value("general.architecture") == "qwen35"
    assert value("qwen35.block_count") == 9
    assert value("qwen35.rope.freq_base") == 1e7
    assert value("qwen35.rope.dimension_sections") == [3, 3, 2, 0]
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == 512 and tokens[0] == "!" and tokens[-1] == "[PAD511]"
    assert set(map(type, value("tokenizer.ggml.token_type"))) == {int}


def test_folders_have_none(folder):
    checkpoint = _native.Checkpoint(str(folder))
    assert checkpoint.convention == "transformers"
    assert checkpoint.gguf_keys() == [] and checkpoint.gguf_value("general.architecture") is None


def test_a_text_that_is_no_utf8(path, tmp_path):
    """The file is fine for who does not ask."""
    damaged = tmp_path / "damaged.gguf"
    data = path.read_bytes()
    for text in (b"Tiny F32", b"[PAD511]"):
        assert data.count(text) == 1
        data = data.replace(text, b"\xff" + text[1:])
    damaged.write_bytes(data)
    checkpoint = _native.Checkpoint(str(damaged))
    for key in ("general.name", "tokenizer.ggml.tokens"):
        with pytest.raises(qdelta.FileError, match=f"damaged.gguf: key `{key}`: .* no UTF-8"):
            checkpoint.gguf_value(key)
