"""Converted files: when they are made, found again, made anew, and what they carry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qdelta
from qdelta import _native, weights
from qdelta.cache import cache_folder
from tiny import Container, make_checkpoint, only_file

# Enough weights for a conversion of some tenths of a second.
LARGE = {"hidden_size": 256, "intermediate_size": 16384, "num_hidden_layers": 4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small checkpoint with tokenizer and template."""
    return make_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("large") / "model", LARGE)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def converted(cache: Path) -> Path:
    """The one converted file there; nothing unfinished lies beside it."""
    names = [path.name for path in cache.iterdir() if path.suffix != ".lock"]
    (name,) = names
    assert name.endswith(".safetensors")
    return cache / name


def identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def logits(checkpoint: _native.Checkpoint) -> np.ndarray:
    session = _native.Model(checkpoint, threads=1).session()
    session.feed(np.array([1, 2, 3], np.int32))
    return session.logits()


# ----------------------------------------------------------------------- which format, and where


def test_small_models_stay_as_they_are(model: Path, cache: Path):
    assert weights.open_model(model, "auto", cache).quant == "none"
    assert not cache.exists()


def test_auto_is_balanced_for_others(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    assert weights.open_model(model, "auto", cache).quant == "balanced"
    assert converted(cache).name.endswith(".balanced.safetensors")


@pytest.mark.parametrize("quant", ["none", "w8", "w4"])
def test_each_format(model: Path, cache: Path, quant: str):
    loaded = qdelta.load(model, quant=quant, cache=cache)
    assert loaded.native.quant == quant
    if quant == "none":
        assert not cache.exists()
    else:
        _native.verify(str(converted(cache)))


def test_formats_and_models_have_files_of_their_own(model: Path, tmp_path: Path, cache: Path):
    other = make_checkpoint(tmp_path / "elsewhere" / "model", seed=1)
    for folder in (model, other):
        for quant in ("w4", "w8"):
            weights.open_model(folder, quant, cache)
    assert len(list(cache.glob("*.safetensors"))) == 4


def test_an_unknown_format(model: Path, cache: Path):
    with pytest.raises(
        qdelta.ArgumentError,
        match="'q4', expected one of: auto, none, balanced, small, fine, best, w8, w4, gguf",
    ):
        weights.open_model(model, "q4", cache)


def test_the_environment_names_the_folder(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QDELTA_CACHE", str(tmp_path / "by-environment"))
    qdelta.load(model, quant="w8")
    assert converted(tmp_path / "by-environment")
    qdelta.load(model, quant="w8", cache=cache)  # an argument wins
    assert converted(cache)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG rules are Linux's")
def test_the_platforms_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QDELTA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/qdelta")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/qdelta")


# ------------------------------------------------------------------------------ fresh or stale


def test_the_second_time_nothing_is_converted(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    first = logits(weights.open_model(model, "w4", cache))
    before = identity(converted(cache))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(weights, "convert", refuse)
    second = weights.open_model(model, "w4", cache)
    assert identity(converted(cache)) == before
    np.testing.assert_array_equal(logits(second), first)


def test_a_finished_file_needs_no_lock(model: Path, cache: Path):
    """A cache that one may only read serves."""
    weights.open_model(model, "w4", cache)
    lock = Path(f"{converted(cache)}.lock")
    lock.unlink()
    lock.mkdir()  # opening it for writing fails now, whoever asks
    assert weights.open_model(model, "w4", cache).quant == "w4"


def test_other_weights(model: Path, cache: Path):
    first = logits(weights.open_model(model, "w8", cache))
    make_checkpoint(model, seed=7)
    second = logits(weights.open_model(model, "w8", cache))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(second, logits(weights.open_model(model, "w8", cache)))


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_changed_source(model: Path, cache: Path, what: str):
    weights.open_model(model, "w8", cache)
    path = converted(cache)
    before = identity(path)
    file = only_file(model)
    status = file.stat()
    if what == "time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    else:
        container = Container.read(file)
        container.metadata["note"] = "longer"
        container.write(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.open_model(model, "w8", cache).quant == "w8"
    assert identity(converted(cache)) != before
    again = identity(path)
    weights.open_model(model, "w8", cache)
    assert identity(converted(cache)) == again


def test_another_version(model: Path, cache: Path):
    weights.open_model(model, "w8", cache)
    path = converted(cache)
    content = path.read_bytes()
    old = content.replace(b'"qdelta.version":"6"', b'"qdelta.version":"1"', 1)
    assert old != content
    path.write_bytes(old)
    with pytest.raises(qdelta.UnsupportedError, match="version"):
        qdelta.load(path)
    weights.open_model(model, "w8", cache)
    assert path.read_bytes() == content


def test_another_recipe(model: Path, cache: Path):
    """A file whose recipe had other formats: it is made again, and elsewhere it opens as ever."""
    weights.open_model(model, "w4", cache)
    path = converted(cache)
    content = path.read_bytes()
    source = _native.Checkpoint(str(model))
    chosen = {name: "w8_planes" for name, _, _ in source.matrices() if "embed_tokens" in name}
    assert chosen
    _native.convert(source, str(path), quant="w4", formats=chosen, attachments=[])
    other = path.read_bytes()
    assert other != content
    assert len(logits(weights.open_checkpoint(path)))
    weights.open_model(model, "w4", cache)
    assert path.read_bytes() == content


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "header cut": lambda content: content[:100],
    "garbage": lambda content: b"\xff" * len(content),
    "longer": lambda content: content + b"\0",
    "text": lambda content: b"no such thing",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_made_again(model: Path, cache: Path, how: str):
    weights.open_model(model, "w8", cache)
    path = converted(cache)
    content = path.read_bytes()
    path.write_bytes(DAMAGE[how](content))
    assert weights.open_model(model, "w8", cache).quant == "w8"
    assert converted(cache).read_bytes() == content


def test_any_number_of_threads_gives_the_same_bytes(model: Path, tmp_path: Path):
    contents = []
    for threads in (1, 2, 3, None):
        weights.open_model(model, "w4", tmp_path / str(threads), threads=threads)
        contents.append(converted(tmp_path / str(threads)).read_bytes())
    assert len(set(contents)) == 1


# ------------------------------------------------------------------------------ a file as MODEL


@pytest.mark.parametrize("quant", ["w8", "w4"])
def test_a_converted_file_is_a_whole_model(model: Path, tmp_path: Path, quant: str):
    out = tmp_path / "moved" / "one-file.safetensors"
    out.parent.mkdir()
    weights.convert(_native.Checkpoint(str(model)), model, out, quant=quant)
    reference = qdelta.load(model, quant=quant, cache=tmp_path / "cache")
    only = qdelta.load(out)
    assert only.native.quant == quant
    messages = [{"role": "user", "content": "Hello"}]
    assert only.render(messages) == reference.render(messages)
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    assert only.chat(messages, **options).tokens == reference.chat(messages, **options).tokens
    assert qdelta.Tokenizer(out).encode("Hello") == reference.encode("Hello")
    # It stays what it is.
    assert qdelta.load(out, quant=quant).native.quant == quant
    with pytest.raises(qdelta.UnsupportedError, match=f"already converted to {quant}"):
        qdelta.load(out, quant="none")


def test_a_file_cannot_be_converted_again(model: Path, tmp_path: Path):
    out = tmp_path / "once.safetensors"
    weights.convert(_native.Checkpoint(str(model)), model, out, quant="w8")
    with pytest.raises(qdelta.ArgumentError, match="already converted"):
        weights.convert(_native.Checkpoint(str(out)), out, tmp_path / "twice", quant="w4")
    assert not (tmp_path / "twice").exists()


def test_other_files_are_not_overwritten(model: Path, tmp_path: Path):
    out = tmp_path / "precious.txt"
    out.write_text("words")
    with pytest.raises(qdelta.ArgumentError, match="not a converted file"):
        weights.convert(_native.Checkpoint(str(model)), model, out, quant="w8")
    assert out.read_text() == "words"
    weights_file = only_file(model)
    before = weights_file.read_bytes()
    with pytest.raises(qdelta.ArgumentError, match="not a converted file"):
        weights.convert(_native.Checkpoint(str(model)), model, weights_file, quant="w8")
    assert weights_file.read_bytes() == before


# --------------------------------------------------------------------- progress, faults, company


def test_progress_is_told(large: Path, tmp_path: Path):
    told: list[tuple[int, int]] = []
    _native.convert(
        _native.Checkpoint(str(large)),
        str(tmp_path / "out.safetensors"),
        quant="w4",
        attachments=[],
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    done = [d for d, _ in told]
    (total,) = {t for _, t in told}
    assert done == sorted(done) and done[-1] == total > 0


def test_a_bar_is_shown_if_asked_for(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    weights.open_model(model, "w8", tmp_path / "a", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Converting model to w8" in err
    weights.open_model(model, "w8", tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_an_exception_in_progress_leaves_nothing(large: Path, tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    out = tmp_path / "folder" / "out.safetensors"
    out.parent.mkdir()
    with pytest.raises(Stop):
        _native.convert(
            _native.Checkpoint(str(large)), str(out), quant="w4", attachments=[], progress=stop
        )
    assert not list(out.parent.iterdir())


LOAD = """
import sys, qdelta
from qdelta import weights
print("ready", flush=True)
print(weights.open_model(sys.argv[1], "w4", sys.argv[2], threads=1).quant)
"""


def start(model: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(model), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_no_temporary_file(large: Path, cache: Path):
    process = start(large, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and process.returncode == -signal.SIGINT
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert weights.open_model(large, "w4", cache).quant == "w4"


def test_what_a_killed_process_left_is_removed(model: Path, cache: Path):
    path = weights.converted_path(model, "w8", cache)
    cache.mkdir()
    (cache / f".{path.name}.12345-0.part").write_bytes(b"half")
    weights.open_model(model, "w8", cache)
    assert converted(cache) == path


def test_two_processes_at_once_make_one_good_file(large: Path, cache: Path):
    processes = [start(large, cache) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "ready\nw4\n", err
    _native.verify(str(converted(cache)))


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(qdelta.FileAccessError) as caught:
        qdelta.load(model, quant="w8", cache=tmp_path / "file" / "cache")
    message = str(caught.value)
    assert "cache" in message and "QDELTA_CACHE" in message
    assert isinstance(caught.value, OSError) and caught.value.filename


def test_a_folder_in_the_way_of_the_file(model: Path, cache: Path):
    weights.converted_path(model, "w8", cache).mkdir(parents=True)
    with pytest.raises(qdelta.Error, match=r"w8\.safetensors|cache"):
        weights.open_model(model, "w8", cache)
