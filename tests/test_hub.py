"""Models by their name, fetched from a server on loopback that speaks the hub's protocol.

Every case runs in a process of its own: `huggingface_hub` reads its settings at import.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import qdelta
from loopback_hub import Hub, output, run, serve
from qdelta import hub as qdelta_hub
from tiny import make_checkpoint

NAME = "Owner/Tiny-Qwen3.5"
UNWANTED = {
    "README.md": "# Tiny",
    "pytorch_model.bin": "pickle",
    "LICENSE": "words",
    "onnx/model.safetensors": "another form",
    "tiny-Q4_K_M.gguf": "GGUF",
    "training_args.safetensors": "not weights",
}

LOAD = f"""
    m = qdelta.load({NAME!r})
    print(len(m.generate("ab", max_tokens=3, temperature=0, ignore_eos=True).tokens))
    print(m.native.quant)
"""
LOAD_OFFLINE = LOAD.replace(f"load({NAME!r}", f"load({NAME!r}, offline=True")
TOKENIZER = f"print(len(qdelta.Tokenizer({NAME!r}).encode('Once upon a time')))"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_checkpoint(tmp_path / "served", shards=2)
    for name, content in UNWANTED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    with serve(NAME, folder) as server:
        yield server


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_only_what_a_model_needs_is_fetched(hub: Hub, tmp_path: Path):
    done = run(LOAD, tmp_path, hub.url)
    assert output(done) == "3\nnone"
    assert "\r" not in done.stderr, "a bar in a pipe"
    fetched = hub.fetched()
    assert not fetched & set(UNWANTED)
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= fetched
    assert sum(name.endswith(".safetensors") for name in fetched) == 2


def test_a_second_call_is_cheap(hub: Hub, tmp_path: Path):
    output(run(LOAD, tmp_path, hub.url))
    hub.requests.clear()
    assert output(run(LOAD, tmp_path, hub.url)) == "3\nnone"
    assert not hub.fetched()
    assert len(hub.requests) <= 2, hub.requests


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_sends_nothing(hub: Hub, tmp_path: Path, how: str):
    output(run(LOAD, tmp_path, hub.url))
    hub.requests.clear()
    code = LOAD_OFFLINE if how == "argument" else LOAD
    settings = {} if how == "argument" else {"HF_HUB_OFFLINE": "1"}
    assert output(run(code, tmp_path, hub.url, **settings)) == "3\nnone"
    assert hub.requests == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_without_a_copy(hub: Hub, tmp_path: Path, how: str):
    code = LOAD_OFFLINE if how == "argument" else LOAD
    settings = {} if how == "argument" else {"HF_HUB_OFFLINE": "1"}
    message = output(run(code, tmp_path, hub.url, **settings))
    assert message.startswith("FileAccessError") and NAME in message
    assert "fetch it online" in message
    assert hub.requests == []


def test_a_tokenizer_reads_no_weights(hub: Hub, tmp_path: Path):
    assert int(output(run(TOKENIZER, tmp_path, hub.url))) > 0
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    # What is there now is no whole model, and offline work says so.
    message = output(run(LOAD_OFFLINE, tmp_path, hub.url))
    assert message.startswith(("FileAccessError", "FileError")), message
    assert output(run(LOAD, tmp_path, hub.url)) == "3\nnone"


def test_a_plan_fetches_no_weights(hub: Hub, tmp_path: Path):
    code = f"print(qdelta.plan({NAME!r}, quant='w4', ctx=300).total)"
    planned = int(output(run(code, tmp_path, hub.url)))
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    assert planned == qdelta.plan(hub.folder, quant="w4", ctx=300).total
    # Nor does a load that a limit forbids.
    refused = output(run(f"qdelta.load({NAME!r}, memory_limit='1 kB')", tmp_path, hub.url))
    assert refused.startswith("MemoryLimitError")
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_new_commit_is_seen(hub: Hub, tmp_path: Path):
    output(run(LOAD, tmp_path, hub.url))
    hub.commit = "f" * 40
    hub.requests.clear()
    code = f"from qdelta import hub; print(hub.resolve({NAME!r}))"
    assert "f" * 40 in output(run(code, tmp_path, hub.url))


def test_converted_once_and_named_after_the_model(hub: Hub, tmp_path: Path):
    cache = tmp_path / "converted"
    code = LOAD.replace(f"load({NAME!r}", f"load({NAME!r}, quant='w8', cache={str(cache)!r}")
    assert output(run(code, tmp_path, hub.url)) == "3\nw8"
    (made,) = cache.glob("*.w8.safetensors")
    assert "Owner--Tiny-Qwen3.5" in made.name
    before = made.stat()
    assert output(run(code, tmp_path, hub.url)) == "3\nw8"
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    # A new revision with the same weights has nothing to convert; one with others takes its place.
    (hub.folder / "README.md").write_text("# Tiny and new")
    hub.commit = "a" * 40
    assert output(run(code, tmp_path, hub.url)) == "3\nw8"
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    make_checkpoint(hub.folder, shards=2, seed=1)
    hub.commit = "b" * 40
    assert output(run(code, tmp_path, hub.url)) == "3\nw8"
    assert made.stat().st_mtime_ns != before.st_mtime_ns
    assert list(cache.glob("*.safetensors")) == [made]


@pytest.mark.parametrize("status", [401, 404])
def test_an_absent_model(hub: Hub, tmp_path: Path, status: int):
    # The hub answers 401 to strangers, who may not know whether a private model exists.
    if status == 401:
        hub.refusal = (401, {"X-Error-Message": "Invalid username or password."})
    message = output(run('qdelta.load("Owner/Absent")', tmp_path, hub.url))
    assert message.startswith("FileAccessError Owner/Absent:"), message
    assert "no such model" in message and "HF_TOKEN" in message and "\n" not in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model(hub: Hub, tmp_path: Path, status: int):
    hub.refusal = (status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
    message = output(run(LOAD, tmp_path, hub.url))
    assert message.startswith(f"FileAccessError {NAME}:"), message
    assert "access must be granted" in message and "HF_TOKEN" in message and "\n" not in message


def test_a_refusal_without_a_reason(hub: Hub, tmp_path: Path):
    hub.refusal = (403, {})
    message = output(run(LOAD, tmp_path, hub.url))
    assert "403" in message and "HF_TOKEN" in message and "\n" not in message


def test_a_broken_server(hub: Hub, tmp_path: Path):
    hub.refusal = (501, {})
    message = output(run(LOAD, tmp_path, hub.url))
    assert message.startswith(f"FileAccessError {NAME}:") and "501" in message
    assert "\n" not in message


def test_no_server(hub: Hub, tmp_path: Path):
    nowhere = f"http://127.0.0.1:{closed_port()}"
    message = output(run(LOAD, tmp_path, nowhere))
    assert message.startswith(f"FileAccessError {NAME}:"), message
    assert nowhere in message and "cannot be reached" in message and "\n" not in message
    # With a copy in the cache the network is not missed.
    output(run(LOAD, tmp_path, hub.url))
    assert output(run(LOAD, tmp_path, nowhere)) == "3\nnone"


def test_a_model_without_config(hub: Hub, tmp_path: Path):
    (hub.folder / "config.json").unlink()
    message = output(run(LOAD, tmp_path, hub.url))
    assert message.startswith("FileAccessError") and "config.json" in message


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "a b", "owner/", "/nowhere/at/all", "Qwen/..", "-x/y", "a--b/c", "ä/ö", "x" * 200],
)
def test_what_is_no_name(name: str):
    with pytest.raises(qdelta.ArgumentError, match="no such file or folder, and no name"):
        qdelta_hub.resolve(name, offline=True)
