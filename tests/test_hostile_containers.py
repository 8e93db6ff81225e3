"""Damaged safetensors files, as downloaded or as converted: an exception that names the place.

The files are opened through the extension, which reads no more than it must.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import qdelta
from hostile import NAME, PREFIX, open_model, refuses
from qdelta import _native
from tiny import TEXT_PREFIXES, Container, Stored, only_file


def test_every_truncation(folder):
    """Cut anywhere: in the length, in the header, in the data."""
    path = only_file(folder)
    raw = path.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    cuts = {*range(10), *range(8, 8 + header, 101), 7 + header, 8 + header, 9 + header}
    cuts |= {*range(8 + header, len(raw), 5003), len(raw) - 1, len(raw) - 2}
    for cut in sorted(cuts):
        path.write_bytes(raw[:cut])
        refuses(folder, path.name, kind=qdelta.FileError)


def test_appended_bytes(folder):
    path = only_file(folder)
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    refuses(folder, path.name)


@pytest.mark.parametrize(
    "length", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001, 2**64 - 8]
)
def test_header_length(folder, length):
    path = only_file(folder)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refuses(folder, path.name, kind=qdelta.FileError)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        b"\xff\xfe{}",
        b'{"a\xff": 1}',
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"__metadata__": 3}',
        '{"__metadata__": {"a": {"b": 1}}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1, 2]}}',
        '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": 32, "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_header_that_is_none(folder, header):
    path = only_file(folder)
    Container.read(path).write(path, header)
    message = refuses(folder)
    assert path.name in message or "embed_tokens" in message


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [4096, 1024]},
        {"data_offsets": [0, 3072]},
        {"data_offsets": [-3072, 0]},
        {"data_offsets": [2**63, 2**63 + 3072]},
        {"data_offsets": [2**64 - 3072, 2**64]},
        {"data_offsets": [0.5, 3072.5]},
        {"data_offsets": ["0", "3072"]},
        {"data_offsets": [10**9, 10**9 + 3072]},
        {"shape": [48, 33]},
        {"shape": [48, -32]},
        {"shape": [2**32, 2**32]},
        {"shape": [2**63, 2]},
        {"shape": [2**64, 1]},
        {"shape": [1] * 100_000},
        {"dtype": "F32"},
        {"dtype": "F64"},
        {"dtype": "bfloat16"},
        {"dtype": ""},
    ],
    ids=lambda change: str(change)[:50],
)
def test_header_entry(folder, change):
    """One entry that lies about its place, its shape or its type."""
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    header[NAME].update(change)
    container.write(path, header)
    refuses(folder, path.name, kind=qdelta.FileError)


def test_overlap_names_file_and_tensor(folder):
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    offsets = header[NAME]["data_offsets"]
    header[NAME]["data_offsets"] = [offset - 64 for offset in offsets]
    container.write(path, header)
    refuses(folder, path.name, "tensor `")


def test_one_name_twice(folder):
    path = only_file(folder)
    container = Container.read(path)
    text = json.dumps(container.header())
    entry = json.dumps(container.header()[NAME])
    container.write(path, f'{text[:-1]}, "{NAME}": {entry}}}')
    refuses(folder, path.name, NAME)


def test_two_spellings_of_one_tensor(folder):
    """Under two prefixes: which one counts is a question, not a choice to be made."""
    path = only_file(folder)
    container = Container.read(path)
    name = NAME.replace(PREFIX, TEXT_PREFIXES[1])
    container.tensors[name] = Stored.of("BF16", np.ones((48, 32)))
    container.write(path)
    refuses(folder, path.name, "up_proj")


# ------------------------------------------------------------------------- converted files


@pytest.fixture
def converted(folder, tmp_path) -> Path:
    out = tmp_path / "model-w8.safetensors"
    _native.convert(_native.Checkpoint(str(folder)), str(out), quant="w8", attachments=[])
    return out


def test_converted_file_opens(converted):
    open_model(converted)
    assert _native.Checkpoint(str(converted)).quant == "w8"


def test_converted_truncations(converted):
    raw = converted.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    for cut in {0, 7, 8, 100, 8 + header, len(raw) // 2, len(raw) - 1}:
        converted.write_bytes(raw[:cut])
        refuses(converted, converted.name, kind=qdelta.FileError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qdelta.version", "999"),
        ("qdelta.version", "x"),
        ("qdelta.version", None),
        ("qdelta.quant", "w3"),
        ("qdelta.convention", "other"),
        ("qdelta.convention", None),
        ("qdelta.quant", None),
        ("qdelta.config", None),
        ("qdelta.config", "{}"),
        ("qdelta.config", "["),
    ],
)
def test_converted_metadata(converted, key, value):
    """Same length or not, metadata that lies is refused."""
    raw = converted.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))  # data stays where it was
    converted.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refuses(converted)


def test_converted_tensor_of_another_shape(converted):
    raw = converted.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = next(name for name in header if name.endswith("up_proj.w8"))
    rows, cols = header[name]["shape"]
    assert rows == 3
    header[name]["shape"] = [1, 3 * cols]
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))
    converted.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refuses(converted, converted.name, name, kind=qdelta.FileError)
