"""Plans, tokenizers and `inspect` of GGUF files on the hub fetch their headers and nothing else.

The hub is a server on loopback; each case runs in a process of its own, see `test_hub`.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qdelta
from demo_gguf import write_parts, write_whole
from golden_data import GOLDEN
from loopback_hub import Hub, output, run, serve

NAME = "Owner/Tiny-GGUF"
FILE = "tiny-Q8_0.gguf"
MIB = 1 << 20
PLAN = "print(qdelta.plan({!r}, ctx=300, revision={!r}).total)"
Q8 = f"{NAME}:Q8_0"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(GOLDEN / "gguf" / "tiny-k256-bf16-Q8_0.gguf", folder / FILE)
    (folder / "README.md").write_text("# GGUF")
    with serve(NAME, folder) as server:
        yield server


def planned(hub: Hub, tmp_path: Path, name: str = Q8, revision: str | None = None, **env: str):
    """What a process prints that plans the model, and that it leaves no temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    text = output(run(PLAN.format(name, revision), tmp_path, hub.url, TMPDIR=str(temporary), **env))
    assert list(temporary.iterdir()) == []
    return text


def expected(path: Path) -> str:
    return str(qdelta.plan(path, ctx=300).total)


def test_a_plan_fetches_the_header(hub: Hub, tmp_path: Path):
    size = (hub.folder / FILE).stat().st_size
    assert size > 5 * MIB
    assert planned(hub, tmp_path) == expected(hub.folder / FILE)
    assert hub.sent == {FILE: MIB}
    assert not list((tmp_path / "hf").rglob("*.gguf"))
    # Nor does a load that a limit forbids, nor a tokenizer, fetch more.
    refused = output(run(f"qdelta.load({Q8!r}, memory_limit='1 kB')", tmp_path, hub.url))
    assert refused.startswith("MemoryLimitError")
    assert hub.sent == {FILE: 2 * MIB}
    code = f"print(qdelta.Tokenizer({Q8!r}).encode('Once upon'))"
    assert output(run(code, tmp_path, hub.url)) == str(
        qdelta.Tokenizer(hub.folder / FILE).encode("Once upon")
    )
    assert hub.sent == {FILE: 3 * MIB}


def inspected(hub: Hub, tmp_path: Path, name: str) -> dict:
    """What `qdelta inspect --json` shows, but for the name that it was given."""
    code = f"qdelta.cli.cli.main(['inspect', {name!r}, '--json'], standalone_mode=False)"
    report = json.loads(output(run(f"import qdelta.cli\n{code}", tmp_path, hub.url)))
    del report["model"]
    return report


def test_inspect_fetches_the_header(hub: Hub, tmp_path: Path):
    path = hub.folder / FILE
    local = inspected(hub, tmp_path, str(path))
    assert hub.requests == []
    assert inspected(hub, tmp_path, Q8) == local
    assert hub.sent == {FILE: MIB} and path.stat().st_size > 5 * MIB
    assert not list((tmp_path / "hf").rglob("*.gguf"))
    # A file that is here is read.
    output(run(f"qdelta.pull({Q8!r})", tmp_path, hub.url))
    before = dict(hub.sent)
    assert inspected(hub, tmp_path, Q8) == local
    assert hub.sent == before


def test_a_file_that_is_here_is_used(hub: Hub, tmp_path: Path):
    output(run(f"qdelta.pull({Q8!r})", tmp_path, hub.url))
    before = dict(hub.sent)
    hub.commit = "a" * 40  # with the same content
    assert planned(hub, tmp_path) == expected(hub.folder / FILE)
    assert hub.sent == before
    hub.requests.clear()
    assert planned(hub, tmp_path, HF_HUB_OFFLINE="1") == expected(hub.folder / FILE)
    assert hub.requests == []
    hub.commit = "b" * 40
    with (hub.folder / FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert planned(hub, tmp_path) == expected(hub.folder / FILE)
    assert hub.sent[FILE] == before[FILE] + MIB


def test_a_long_header(hub: Hub, tmp_path: Path):
    path = write_whole(hub.folder / "long-F32.gguf", 3 * MIB, 16 * MIB)
    assert planned(hub, tmp_path, f"{NAME}:F32") == expected(path)
    assert hub.sent == {path.name: 4 * MIB}
    assert hub.ranges == [f"bytes={a * MIB}-{b * MIB - 1}" for a, b in ((0, 1), (1, 2), (2, 4))]


def test_all_parts(hub: Hub, tmp_path: Path):
    first, second = write_parts(hub.folder, "long-F32", MIB, 4 * MIB)
    assert planned(hub, tmp_path, f"{NAME}:F32") == expected(first)
    assert hub.sent == {first.name: 2 * MIB, second.name: MIB}


@pytest.mark.parametrize("revision", ["v1", "v2"])
def test_revisions(hub: Hub, tmp_path: Path, revision: str):
    hub.tags.add("v1")
    text = planned(hub, tmp_path, revision=revision)
    if revision == "v1":
        assert text == expected(hub.folder / FILE)
    else:
        assert text == f"FileAccessError {NAME}: the hub has no revision 'v2' of it"
        assert not hub.sent


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGML" + bytes(20), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 5 * MIB), "cut short or damaged"),
        (b"", "no GGUF file"),
    ],
)
def test_damaged_headers(hub: Hub, tmp_path: Path, content: bytes, words: str):
    (hub.folder / FILE).write_bytes(content + bytes(4 * MIB) if content else b"")
    text = planned(hub, tmp_path)
    assert text.startswith(("FileError", "UnsupportedError")) and FILE in text, text
    assert words in text, text
    assert hub.sent.get(FILE, 0) <= MIB


def test_a_header_without_an_end(hub: Hub, tmp_path: Path):
    """A text as long as the file: no more is fetched than headers may have."""
    long = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 8, 7 * MIB)
    (hub.folder / FILE).write_bytes(long + bytes(8 * MIB))
    code = f"from qdelta import hub; hub._MOST_HEADER = 4 << 20; qdelta.plan({Q8!r})"
    assert "a header of more than 4 MiB" in output(run(code, tmp_path, hub.url))
    assert hub.sent == {FILE: 4 * MIB}


def test_a_server_without_ranges(hub: Hub, tmp_path: Path):
    hub.ranged = False
    text = planned(hub, tmp_path)
    assert text.startswith(f"FileAccessError {NAME}: the hub sent") and FILE in text


@pytest.mark.parametrize("how", ["argument", "environment", "nowhere"])
def test_without_a_network(hub: Hub, tmp_path: Path, how: str):
    code, env, url = f"qdelta.plan({Q8!r})", {}, hub.url
    if how == "argument":
        code = f"qdelta.plan({Q8!r}, offline=True)"
    elif how == "environment":
        env = {"HF_HUB_OFFLINE": "1"}
    else:
        url = "http://127.0.0.1:9"
    text = output(run(code, tmp_path, url, **env))
    assert text.startswith(f"FileAccessError {NAME}: ")
    assert ("cannot be reached" if how == "nowhere" else "no network is to be used") in text
    assert hub.requests == []
