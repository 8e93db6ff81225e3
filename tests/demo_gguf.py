"""The demo as GGUF files with a header of any length, whole or in two parts."""

from __future__ import annotations

import struct
from pathlib import Path

import qdelta
from qdelta import _native, gguf
from qdelta.source import tokenizer_files


def write_whole(out: Path, header: int = 0, holes: int = 0, **more: object) -> Path:
    """A file with a header of more than `header` bytes, and `holes` more than its tensors take."""
    demo = qdelta.source.locate("demo")
    source = _native.Checkpoint(str(demo))
    files = tokenizer_files(demo, source)
    size = qdelta.load("demo").native.vocab_size
    entries = gguf.metadata(files, name="long", licence=None, vocab_size=size)
    extra = [("general.description", "x" * header), *more.items()]
    out.unlink(missing_ok=True)
    _native.export_gguf(source, str(out), dtype="F32", metadata=[*entries, *extra])
    with out.open("ab") as file:
        file.write(bytes(holes))
    return out


def write_parts(folder: Path, stem: str, header: int = 0, holes: int = 0) -> tuple[Path, Path]:
    """The same in two parts, the second of which has no tensors."""
    demo = _native.Checkpoint(str(qdelta.source.locate("demo")))
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": len(demo.tensors())}
    first, second = (folder / f"{stem}-0000{i}-of-00002.gguf" for i in (1, 2))
    write_whole(first, header, holes, **split)
    text = b"GGUF" + struct.pack("<IQQ", 3, 0, len(split))
    for key, value in {**split, "split.no": 1}.items():
        text += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, value)
    second.write_bytes(text + bytes(holes))
    return first, second
