"""The released tokenizer, as stored under tests/golden/tokenizer."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import qdelta

STORED = Path(__file__).parent / "golden" / "tokenizer"
CASES = json.loads((STORED / "cases.json").read_text(encoding="utf-8"))


@functools.cache
def files() -> dict[str, bytes]:
    """Contents of a checkpoint's tokenizer files by name."""
    found = {
        name: (STORED / name).read_bytes()
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    }
    found["tokenizer.json"] = gzip.decompress((STORED / "tokenizer.json.gz").read_bytes())
    return found


@functools.cache
def tokenizer() -> qdelta.Tokenizer:
    return qdelta.Tokenizer.from_files(files())
