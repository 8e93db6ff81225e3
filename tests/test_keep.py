"""Models that are kept: pulled, listed, removed, verified, exported and imported.

The hub is a server on loopback; what talks to it runs in a process of its own. What needs no hub
works on a copy of a cache that was filled by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

import qdelta
from demo_gguf import write_parts
from golden_data import GOLDEN
from loopback_hub import COMMIT, Hub, environment, output, program, run, serve
from qdelta import _native, archive, hub_cache, inventory, keep, weights
from qdelta.cli import cli
from qdelta.verification import verify
from tiny import make_checkpoint

NAME = "Owner/Tiny-Qwen3.5"
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
EXTRAS = {"README.md": "# Tiny", "LICENSE": "words", "pytorch_model.bin": "pickle"}
FETCHED_BY_OTHERS = "pytorch_model.bin"

# Enough weights that a limit on the size of files can lie between one shard and the whole.
LARGE = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 4}


def served_folder(path: Path, **options: object) -> Path:
    folder = make_checkpoint(path, **options)
    for name, content in EXTRAS.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(NAME, served_folder(tmp_path / "served", shards=2)) as server:
        yield server


class Place:
    """A computer: its caches, and what is done on it."""

    def __init__(self, path: Path, endpoint: str = NOWHERE) -> None:
        self.path = path
        self.endpoint = endpoint
        self.cache = path / "cache"
        self.hub = path / "hf" / "hub"

    def environment(self, **settings: str) -> dict[str, str]:
        settings = {"QDELTA_CACHE": str(self.cache), **settings}
        return environment(self.path, self.endpoint, **settings)

    def python(self, code: str) -> str:
        return output(run(code, self.path, self.endpoint, QDELTA_CACHE=str(self.cache)))

    def command(
        self, *args: object, status: int = 0, stdin: str = "", limit: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`qdelta ARGS`. limit: bytes of the largest file that the system lets it write."""
        done = subprocess.run(
            limited(limit, [sys.executable, "-m", "qdelta", *map(str, args)]),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env=self.environment(),
            check=False,
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr[-3000:])
        assert "Traceback" not in done.stderr
        return done

    def tokens(self, model: object = NAME, **options: object) -> str:
        """The quant and some tokens of a model, loaded without network."""
        return self.python(f"""
            m = qdelta.load({str(model)!r}, offline=True, **{options!r})
            print(m.native.quant, m.generate("ab", max_tokens=5, temperature=0).tokens)
        """)


def limited(limit: int | None, command: list[str]) -> list[str]:
    if limit is None:
        return command
    code = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *command]


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Place:
    return Place(tmp_path, hub.url)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of a computer that has pulled and converted the model."""
    path = tmp_path_factory.mktemp("filled")
    folder = served_folder(path / "served", shards=2)
    with serve(NAME, folder) as server:
        there = Place(path / "there", server.url)
        there.python(f"qdelta.pull({NAME!r}); qdelta.load({NAME!r}, quant='w8')")
    return there.path


@pytest.fixture
def here(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of those caches, for this process too."""
    there = Place(tmp_path / "here")
    shutil.copytree(filled, there.path, symlinks=True)
    # A converted file is named after the place of its source.
    (old,) = there.cache.glob("*.w8.safetensors")
    monkeypatch.setenv("QDELTA_CACHE", str(there.cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(there.hub))
    snapshot = hub_cache.snapshot(NAME)
    old.rename(weights.converted_path(snapshot, "w8"))
    for lock in there.cache.glob("*.lock"):
        lock.unlink()
    return there


def converted(here: Place) -> Path:
    (path,) = here.cache.glob("*.w8.safetensors")
    return path


def shard(here: Place) -> Path:
    """The blob of a file with weights."""
    return (hub_cache.snapshot(NAME) / "model.safetensors-00001-of-00002.safetensors").resolve()


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------ pull


def test_pull_fetches_the_model_and_its_papers(place: Place, hub: Hub):
    path = Path(place.python(f"print(qdelta.pull({NAME!r}))"))
    assert (path / "LICENSE").read_text() == "words" and (path / "README.md").exists()
    assert FETCHED_BY_OTHERS not in hub.fetched()
    hub.requests.clear()
    assert place.tokens().startswith("none [")
    assert not hub.requests
    assert f"{NAME} is in {path}" in place.command("pull", NAME).stderr
    assert not hub.fetched()


@pytest.mark.parametrize("quant", ["w4", "w8"])
def test_only_the_converted_model_is_kept(place: Place, hub: Hub, tmp_path: Path, quant: str):
    expected = Place(tmp_path / "other").tokens(hub.folder, quant=quant)
    place.command("pull", NAME, "--only", quant)
    blobs = place.hub / "models--Owner--Tiny-Qwen3.5" / "blobs"
    assert not [path for path in place.hub.rglob("*") if path.suffix == ".safetensors"]
    assert max(path.stat().st_size for path in blobs.iterdir()) < 100_000  # the tokenizer
    assert not list(place.cache.glob("*.safetensors"))
    hub.requests.clear()
    assert place.tokens() == expected
    online = f"print(qdelta.load({NAME!r}).native.quant, qdelta.Tokenizer({NAME!r}).encode('a'))"
    assert place.python(online).startswith(quant)
    assert not hub.requests
    message = place.python(f"qdelta.load({NAME!r}, quant='none')")
    assert message.startswith("UnsupportedError") and "qdelta pull" in message
    place.command("verify", NAME)


def test_only_w4_needs_no_folder_of_the_hub(place: Place, hub: Hub):
    place.command("pull", NAME, "--only", "w4")
    before = place.tokens()
    shutil.rmtree(place.hub)
    assert place.tokens() == before


def test_another_pull_brings_what_is_new(place: Place, hub: Hub):
    place.command("pull", NAME, "--only", "w4")
    first = place.tokens()
    hub.requests.clear()
    place.command("pull", NAME, "--only", "w4")
    assert not hub.fetched()
    make_checkpoint(hub.folder, shards=2, seed=5)
    hub.commit = "b" * 40
    place.command("pull", NAME, "--only", "w4")
    assert place.tokens() != first
    kept = archive.kept_folder(NAME, place.cache)
    assert archive.read_manifest(kept).revision == "b" * 40
    place.command("pull", NAME, "--only", "w8")  # another form takes its place
    assert place.tokens().startswith("w8 ")
    place.command("pull", NAME)  # and the original
    assert place.tokens().startswith("none ")
    assert not kept.exists()


def test_another_pull_repairs_what_is_kept(place: Place, hub: Hub):
    place.command("pull", NAME, "--only", "w4")
    before = place.tokens()
    kept = archive.kept_folder(NAME, place.cache)
    flip(kept / "model.w4.safetensors")
    assert "model.w4.safetensors: sha256" in place.command("verify", NAME, status=1).stdout
    place.command("pull", NAME, "--only", "w4")
    (kept / archive.MANIFEST).write_text("{")
    assert "not a valid manifest" in place.command("verify", NAME, status=1).stderr
    place.command("pull", NAME, "--only", "w4")
    place.command("verify", NAME)
    assert place.tokens() == before


def test_originals_of_others_are_asked_for(place: Place, hub: Hub):
    place.command("pull", NAME)
    asked = place.command("pull", NAME, "--only", "w4", stdin="n\n", status=130)
    assert "in the hub's cache already" in asked.stderr
    assert place.tokens().startswith("none ")
    place.command("pull", NAME, "--only", "w4", "--yes")
    assert place.tokens().startswith("w4 ")
    assert not keep_files(place, ".safetensors")


def keep_files(place: Place, suffix: str) -> list[Path]:
    return [path for path in place.hub.rglob(f"*{suffix}") if not path.is_dir()]


def test_only_w4_leaves_what_it_did_not_fetch(place: Place, hub: Hub):
    """Other files of the snapshot, and weights that another revision shares."""
    other = "c" * 40
    place.python(f"""
        import huggingface_hub as h
        h.snapshot_download({NAME!r})
    """)
    hub.commit = other
    place.command("pull", NAME, "--only", "w4", "--yes")
    repo = place.hub / "models--Owner--Tiny-Qwen3.5"
    assert (repo / "snapshots" / COMMIT / FETCHED_BY_OTHERS).exists()
    assert len(list((repo / "snapshots" / COMMIT).glob("*.safetensors"))) == 2
    assert all(path.exists() for path in (repo / "snapshots" / COMMIT).iterdir())
    assert not list((repo / "snapshots" / other).glob("*.safetensors"))


def test_revisions(place: Place, hub: Hub):
    hub.tags.add("v1")
    path = place.python(f"print(qdelta.pull({NAME!r}, revision='v1'))")
    assert path.endswith(COMMIT)
    assert place.tokens(revision="v1").startswith("none ")
    assert place.tokens(revision=COMMIT).startswith("none ")
    message = place.command("pull", NAME, "--revision", "v2", status=1).stderr
    assert "no revision 'v2'" in message and message.count("\n") == 1
    message = place.python(f"qdelta.load({NAME!r}, revision='v2')")
    assert "no revision 'v2'" in message
    # What is kept of one revision does not serve another.
    place.command("pull", NAME, "--only", "w4", "--revision", "v1", "--yes")
    for options in ({}, {"revision": COMMIT}, {"revision": "v1"}):
        assert place.tokens(**options).startswith("w4 ")
    message = place.python(f"qdelta.load({NAME!r}, revision={'d' * 40!r}, offline=True)")
    assert message.startswith("FileAccessError")


def test_commands_of_revisions(place: Place, hub: Hub):
    hub.tags.add("v1")
    text = place.path / "text.txt"
    text.write_text("Once upon a time there was a small model. " * 4)
    for number, command in enumerate((
        ("plan", NAME, "--ctx", 100),
        ("inspect", NAME),
        ("convert", NAME, "-o", place.path / "out.safetensors"),
        ("bench", NAME, "-p", 4, "-n", 0, "-r", 1, "--quant", "none"),
        ("eval", NAME, "--against", NAME, "--window", 8, "--text", text, "--quant", "none"),
    )):  # fmt: skip
        hub.commit = f"{number:040x}"
        place.command(*command, "--revision", "v1")
        assert (place.hub / "models--Owner--Tiny-Qwen3.5" / "snapshots" / hub.commit).is_dir()
        message = place.command(*command, "--revision", "v2", status=1).stderr
        assert "no revision 'v2'" in message and message.count("\n") == 1
    for command in ("plan", "bench"):
        message = place.command(command, "--synthetic", "0.8B", "--revision", "v1", status=2).stderr
        assert "--revision is for names on the hub" in message


@pytest.mark.parametrize("only", ["w5", "gguf", "gguf:", "none", "Q4_K_M", ""])
def test_forms_that_are_none(only: str):
    with pytest.raises(
        qdelta.ArgumentError, match="expected balanced, small, fine, best, w8, w4 or gguf:TYPE"
    ):
        qdelta.pull(NAME, only=only)


def test_paths_have_no_revision(tmp_path: Path):
    with pytest.raises(qdelta.ArgumentError, match="revision is for names"):
        qdelta.load(make_checkpoint(tmp_path / "m"), revision="v1")
    with pytest.raises(qdelta.ArgumentError, match="revision is for names"):
        qdelta.load("demo", revision="v1")


# ------------------------------------------------------------------------------------------ GGUF

GGUFS = {
    "x-Q4_K_M.gguf": b"four" * 100,
    "x-Q8_0.gguf": b"eight" * 200,
    "BF16/x-BF16-00001-of-00002.gguf": b"a" * 100,
    "BF16/x-BF16-00002-of-00002.gguf": b"b" * 100,
    "mmproj-F16.gguf": b"tower",
    "mtp-x-Q4_K_M.gguf": b"draft",
    "config.json": b"{}",
    "README.md": b"# GGUF",
}
RESOLVE = "from qdelta import hub; print(hub.resolve({!r}, offline={}))"


@pytest.fixture
def ggufs(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "ggufs"
    for name, content in GGUFS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with serve("Owner/Tiny-GGUF", folder) as server:
        yield server


def test_one_gguf_file_is_fetched(ggufs: Hub, tmp_path: Path):
    there = Place(tmp_path, ggufs.url)
    done = there.command("pull", "Owner/Tiny-GGUF", "--only", "gguf:Q4_K_M")
    assert "Owner/Tiny-GGUF:Q4_K_M is in " in done.stderr
    assert ggufs.fetched() == {"x-Q4_K_M.gguf", "README.md"}
    path = Path(there.python(RESOLVE.format("Owner/Tiny-GGUF:q4_k_m", False)))
    assert path.name == "x-Q4_K_M.gguf" and path.read_bytes() == GGUFS[path.name]
    ggufs.requests.clear()
    assert there.python(RESOLVE.format("Owner/Tiny-GGUF:Q4_K_M", True)) == str(path)
    assert not ggufs.requests
    there.endpoint = NOWHERE  # a network that fails is not missed either
    assert there.python(RESOLVE.format("Owner/Tiny-GGUF:Q4_K_M", False)) == str(path)
    missing = there.python(RESOLVE.format("Owner/Tiny-GGUF:Q8_0", True))
    assert missing.startswith("ArgumentError") and "Q4_K_M (" in missing


def test_all_parts_of_a_gguf_are_fetched(ggufs: Hub, tmp_path: Path):
    there = Place(tmp_path, ggufs.url)
    first, second = write_parts(ggufs.folder / "BF16", "x-BF16")
    path = Path(there.python("print(qdelta.pull('Owner/Tiny-GGUF:BF16'))"))
    assert path.name == first.name
    assert (path.parent / second.name).read_bytes() == second.read_bytes()
    there.command("export", "Owner/Tiny-GGUF:BF16", tmp_path / "out", "--offline")
    manifest = archive.read_manifest(tmp_path / "out")
    assert manifest.quant == "gguf" and manifest.name == "Owner/Tiny-GGUF:BF16"
    names = {file.name for file in manifest.files}
    assert names == {first.name, second.name, "README.md"}
    # Imported under the same name, it is found by it.
    other = Place(tmp_path / "other")
    other.command("import", tmp_path / "out")
    found = archive.find_kept("Owner/Tiny-GGUF:BF16", None, other.cache)
    assert found is not None and found.read_bytes() == first.read_bytes()
    for name in ("Owner/Tiny-GGUF", "Owner/Tiny-GGUF:BF16"):
        assert "3 files, 0 bad" in other.command("verify", name).stderr
    other.command("rm", "--yes", "Owner/Tiny-GGUF")
    assert everything(other.cache / "kept") == set()


def test_a_part_that_is_missing(ggufs: Hub, tmp_path: Path):
    there = Place(tmp_path, ggufs.url)
    path = Path(there.python("print(qdelta.pull('Owner/Tiny-GGUF:BF16'))"))
    (path.parent / "x-BF16-00002-of-00002.gguf").resolve().unlink()
    for name in ("Owner/Tiny-GGUF", "Owner/Tiny-GGUF:BF16"):
        assert "00002-of-00002.gguf: missing" in there.command("verify", name, status=1).stdout
    (path.parent / "x-BF16-00002-of-00002.gguf").unlink()
    for name in ("Owner/Tiny-GGUF", "Owner/Tiny-GGUF:BF16"):
        assert "1 of 2 parts are here" in there.command("verify", name, status=1).stdout
    message = there.command("export", "Owner/Tiny-GGUF:BF16", "out", "--offline", status=1).stderr
    assert "1 of its 2 parts" in message
    there.command("rm", "--yes", "Owner/Tiny-GGUF:BF16")
    assert not keep_files(there, ".gguf")


@pytest.mark.parametrize("offline", [False, True])
def test_a_repository_of_ggufs_wants_a_type(ggufs: Hub, tmp_path: Path, offline: bool):
    there = Place(tmp_path, ggufs.url)
    if offline:
        there.python("qdelta.pull('Owner/Tiny-GGUF:Q8_0')")
    message = there.python(f"qdelta.load('Owner/Tiny-GGUF', offline={offline})")
    assert message.startswith("ArgumentError Owner/Tiny-GGUF: holds GGUF files; name one")
    types = ["Q8_0 ("] if offline else ["Q8_0 (", "Q4_K_M (", "BF16 ("]
    assert all(type in message for type in types)
    assert message.count("GiB") == len(types)


def test_a_type_that_is_not_there(ggufs: Hub, tmp_path: Path):
    there = Place(tmp_path, ggufs.url)
    message = there.command("pull", "Owner/Tiny-GGUF", "--only", "gguf:Q6_K", status=1).stderr
    assert "no GGUF file of the type 'Q6_K'" in message and "Q8_0 (" in message
    assert not ggufs.fetched()


def test_rm_of_one_gguf(ggufs: Hub, tmp_path: Path):
    there = Place(tmp_path, ggufs.url)
    there.python("qdelta.pull('Owner/Tiny-GGUF:Q8_0'); qdelta.pull('Owner/Tiny-GGUF:Q4_K_M')")
    done = there.command("rm", "--yes", "Owner/Tiny-GGUF:Q8_0")
    assert done.stdout == "1000 B freed\n"
    assert [path.name for path in keep_files(there, ".gguf")] == ["x-Q4_K_M.gguf"]
    there.command("verify", "Owner/Tiny-GGUF:Q4_K_M")


@pytest.mark.parametrize("in_folder", [False, True])
def test_one_converted_file_for_all_revisions_of_a_gguf(tmp_path: Path, in_folder: bool):
    name = "Owner/Tiny-GGUF:Q8_0"
    file = tmp_path / "ggufs" / ("Q8_0" if in_folder else "") / "x-Q8_0.gguf"
    file.parent.mkdir(parents=True)
    shutil.copy(GOLDEN / "gguf" / "tiny-k256-bf16-Q8_0.gguf", file)
    load = f"print(qdelta.load({name!r}, quant='gguf').native.quant)"
    with serve("Owner/Tiny-GGUF", tmp_path / "ggufs") as hub:
        there = Place(tmp_path, hub.url)
        assert there.python(load) == "gguf"
        (made,) = there.cache.glob("*.gguf.safetensors")
        before = made.stat()
        (file.parent / "README.md").write_text("# New")
        hub.commit = "a" * 40
        assert there.python(load) == "gguf"
        after = made.stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
        there.command("verify", name)
        flip(file)  # a weight
        hub.commit = "b" * 40
        there.python(f"qdelta.pull({name!r})")
        assert there.python(load) == "gguf"
        assert made.stat().st_mtime_ns != before.st_mtime_ns
    assert list(there.cache.glob("*.safetensors")) == [made]
    there.command("verify", name)
    assert [one["name"] for one in listed(there) if one["place"] == "converted"] == [name]
    there.command("rm", "--yes", name)
    assert not list(there.cache.glob("*")) and not keep_files(there, ".gguf")


# ------------------------------------------------------------- breaks, company, and a full disk


def test_a_broken_connection_goes_on_where_it_was(place: Place, hub: Hub):
    name = "model.safetensors-00001-of-00002.safetensors"
    size = (hub.folder / name).stat().st_size
    hub.cuts[name] = [size // 2, size // 4]
    # What has arrived counts in pieces of this size. The client tries again by itself, but old
    # versions of it leave that to the next call.
    code = f"""
        from huggingface_hub import constants
        constants.DOWNLOAD_CHUNK_SIZE = 1000
        qdelta.pull({NAME!r})
    """
    assert any(place.python(code) == "" for _ in range(3))
    assert len(hub.ranges) == 2
    first, second = (int(text.removeprefix("bytes=").removesuffix("-")) for text in hub.ranges)
    assert size // 2 - 1000 <= first <= size // 2
    assert first + size // 4 - 1000 <= second <= first + size // 4
    place.command("verify", NAME, "--online")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_download_keeps_what_is_whole(place: Place, hub: Hub):
    first, second = (f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2))
    release = hub.hold(second)
    process = subprocess.Popen(program(f"qdelta.pull({NAME!r})"), env=place.environment())
    snapshot = place.hub / "models--Owner--Tiny-Qwen3.5" / "snapshots" / COMMIT
    deadline = time.monotonic() + 60
    while not ((snapshot / first).exists() and (snapshot / "tokenizer.json").exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    release()
    message = place.python(f"qdelta.load({NAME!r}, offline=True)")
    assert message.startswith(("FileAccessError", "FileError"))
    hub.requests.clear()
    place.command("pull", NAME)
    assert second in hub.fetched() and first not in hub.fetched()
    assert place.tokens().startswith("none ")
    place.command("verify", NAME, "--online")
    unfinished = [o for o in listed(place) if o["place"] == "unfinished"]
    place.command("rm", "--yes", NAME)
    assert not listed(place) and not keep_files(place, ".incomplete"), unfinished


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_a_pull_at_once(place: Place, hub: Hub):
    """Though the client's threads wait for a server that does not answer."""
    held = "model.safetensors-00002-of-00002.safetensors"
    release = hub.hold(held)
    command = [sys.executable, "-m", "qdelta", "pull", NAME]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=place.environment()) as process:
        deadline = time.monotonic() + 60
        while held not in hub.fetched():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)  # the server waits for longer
    assert process.returncode == 130 and err.split(b"\n")[-2:] == [b"qdelta: stopped", b""], err
    assert b"Traceback" not in err
    release()
    place.command("pull", NAME)
    assert place.tokens().startswith("none ")


@pytest.mark.parametrize("only", [None, "w4"])
def test_two_processes_at_once(place: Place, hub: Hub, only: str | None):
    code = f"print(qdelta.pull({NAME!r}, only={only!r}))"
    processes = [
        subprocess.Popen(
            program(code),
            env=place.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].strip()).exists(), results
    assert place.tokens().startswith("none " if only is None else "w4 ")
    place.command("verify", NAME)
    assert not [name for name in everything(place.cache) if ".part" in name]
    assert not keep_files(place, ".incomplete")


@pytest.fixture
def large(hub: Hub) -> Hub:
    """The hub with a model whose files are smaller than what it is converted to."""
    shutil.rmtree(hub.folder)
    served_folder(hub.folder, text=LARGE, shards=8)
    return hub


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("lost", ["model.safetensors.index.json", "model*-00002-of-*"])
def test_parts_of_a_model_that_are_missing(place: Place, large: Hub, lost: str):
    """A download that was given up leaves any of its files out."""
    place.command("pull", NAME)
    (path,) = (path for path in place.hub.rglob(lost) if path.parent.parent.name == "snapshots")
    path.unlink()
    assert path.name in "".join(place.command("verify", NAME, status=1).stdout.split())


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_while_downloading(place: Place, large: Hub):
    limit = largest(large.folder) - 1
    message = place.command("pull", NAME, status=1, limit=limit).stderr
    assert "File too large" in message and "\n" not in message.strip()
    message = place.python(f"qdelta.load({NAME!r}, offline=True)")
    assert message.startswith(("FileAccessError", "FileError"))
    place.command("verify", NAME, status=1)
    place.command("pull", NAME)
    assert not keep_files(place, ".incomplete")
    assert place.tokens().startswith("none ")
    place.command("verify", NAME)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("how", ["only", "load", "export", "import"])
def test_a_full_disk_while_writing(place: Place, large: Hub, tmp_path: Path, how: str):
    limit = largest(large.folder) + 10
    out, moved = tmp_path / "out", tmp_path / "moved"
    place.command("pull", NAME)
    place.command("export", NAME, moved, "--quant", "w8")
    before, caches = place.tokens(), everything(place.hub)
    command = {
        "only": ("pull", NAME, "--only", "w8", "--yes"),
        "load": ("run", NAME, "a", "--quant", "w8", "-n", 1),
        "export": ("export", NAME, out, "--quant", "w8"),
        "import": ("import", moved, "--as", "me/other"),
    }[how]
    message = place.command(*command, status=1, limit=limit).stderr
    assert "File too large" in message
    assert not out.exists() and not list(tmp_path.glob(".*"))
    left = everything(place.cache) if place.cache.exists() else set()
    assert all(name == "kept" or name.endswith(".lock") for name in left), left
    assert everything(place.hub) == caches and place.tokens() == before
    place.command(*command)


# ------------------------------------------------------------------------------------------ list


def listed(place: Place) -> list[dict]:
    return json.loads(place.command("list", "--json").stdout)


def test_list(here: Place):
    by_place = {one["place"]: one for one in listed(here)}
    assert set(by_place) == {"hub", "converted"}
    assert all(one["name"] == NAME and one["problem"] is None for one in by_place.values())
    assert by_place["hub"]["refs"] == ["main"] and by_place["hub"]["revision"] == COMMIT
    assert by_place["hub"]["quant"] == "none" and by_place["converted"]["quant"] == "w8"
    snapshot = hub_cache.snapshot(NAME)
    sizes = hub_cache.files(snapshot)
    papers = sum(size for name, size in sizes.items() if name in EXTRAS)
    assert by_place["hub"]["bytes"] == sum(sizes.values()) - papers
    assert by_place["converted"]["bytes"] == converted(here).stat().st_size
    assert abs(by_place["hub"]["last_used"] - time.time()) < 24 * 3600
    shown = here.command("list").stdout
    assert shown.count(NAME) == 2 and "w8" in shown and "main" in shown


def test_list_shows_what_is_kept_and_what_is_broken(here: Place, tmp_path: Path):
    out = keep.export("demo", tmp_path / "out", quant="w8")
    keep.import_folder(out, name="me/demo")
    other = here.hub / "models--someone--bert" / "snapshots" / COMMIT
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_bytes(b"whatever")
    shard(here).unlink()
    converted(here).write_bytes(b"")
    (here.cache / "kept" / "models--me--broken").mkdir()
    (here.cache / "kept" / "models--me--broken" / archive.MANIFEST).write_text("{")
    found = {(one.name, one.place): one for one in inventory.held()}
    kept, broken = found.pop(("me/demo", "kept")), found.pop(("me/broken", "kept"))
    assert kept.quant == "w8" and kept.problem is None
    assert "not a valid manifest" in broken.problem
    assert set(found) == {(NAME, "hub"), (NAME, "converted")}
    assert all(one.problem for one in found.values())


def test_list_of_nothing(tmp_path: Path):
    done = Place(tmp_path).command("list")
    assert done.stdout == "" and "qdelta pull" in done.stderr
    assert listed(Place(tmp_path)) == []


# -------------------------------------------------------------------------------------------- rm


def test_rm(here: Place):
    repo = here.hub / "models--Owner--Tiny-Qwen3.5"
    expected = sum(path.stat().st_size for path in (repo / "blobs").iterdir())
    expected += converted(here).stat().st_size
    neighbour = here.hub / "models--Owner--Tiny-Qwen3.5-More"
    shutil.copytree(repo, neighbour, symlinks=True)
    before = everything(neighbour)
    (here.cache / "other.safetensors").write_text("mine")
    asked = here.command("rm", NAME, stdin="n\n", status=130)
    assert str(repo) in asked.stderr and str(converted(here)) in asked.stderr
    assert repo.exists()
    assert inventory.remove(NAME) == expected
    assert not repo.exists() and everything(neighbour) == before
    assert [path.name for path in here.cache.iterdir()] == ["other.safetensors"]
    assert "nothing of it is here" in here.command("rm", "--yes", NAME, status=1).stderr


def test_rm_of_converted_files(here: Place, tmp_path: Path):
    before = everything(here.hub)
    done = here.command("rm", "--converted", "--yes", NAME)
    assert done.stdout.endswith(" freed\n")
    assert not list(here.cache.iterdir()) and everything(here.hub) == before
    folder = make_checkpoint(tmp_path / "mine")
    weights.open_model(folder, "w8")
    assert inventory.remove(str(folder), converted=True) > 0
    assert not list(here.cache.iterdir()) and (folder / "config.json").exists()
    with pytest.raises(qdelta.Error, match="is a path"):
        inventory.remove(str(folder), converted=False)
    assert (folder / "config.json").exists()


def test_rm_of_what_is_kept(here: Place, tmp_path: Path):
    keep.import_folder(keep.export("demo", tmp_path / "out"), name="me/demo")
    assert here.tokens("me/demo")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert inventory.remove("me/demo") == size
    assert everything(here.cache / "kept") == set()
    assert converted(here).exists()


def test_rm_of_a_damaged_cache(here: Place):
    """Also what the client's own scan cannot read."""
    shard(here).unlink()
    (here.hub / "models--Owner--Tiny-Qwen3.5" / "blobs" / "x.1234.incomplete").write_text("half")
    here.command("rm", "--yes", NAME)
    assert not (here.hub / "models--Owner--Tiny-Qwen3.5").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_rm_follows_no_link(here: Place, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("words")
    repo = here.hub / "models--Owner--Tiny-Qwen3.5"
    (repo / "snapshots" / COMMIT / "link").symlink_to(precious / "file")
    (repo / "snapshots" / COMMIT / "folder").symlink_to(precious)
    converted(here).unlink()
    weights.converted_path(hub_cache.snapshot(NAME), "w8").symlink_to(precious / "file")
    inventory.remove(NAME)
    assert not repo.exists() and (precious / "file").read_text() == "words"
    (precious / "snapshots" / COMMIT).mkdir(parents=True)
    repo.symlink_to(precious)
    kept = archive.kept_folder("me/x", here.cache)
    kept.parent.mkdir(exist_ok=True)
    kept.symlink_to(precious)
    for name in (NAME, "me/x"):
        with pytest.raises(qdelta.FileAccessError, match="is a link"):
            inventory.remove(name)
    assert (precious / "file").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_a_link_out_of_the_cache_loses_only_the_link(here: Place, tmp_path: Path):
    blob = shard(here)
    away = tmp_path / blob.name
    blob.rename(away)
    snapshot = hub_cache.snapshot(NAME)
    entry = snapshot / "model.safetensors-00001-of-00002.safetensors"
    entry.unlink()
    entry.symlink_to(away)
    hub_cache.remove_files(snapshot, [entry.name])
    assert away.exists() and not os.path.lexists(entry)


@pytest.mark.parametrize("name", ["..", "../..", "a/../..", "/", ".", "a--b/../c"])
def test_names_lead_nowhere_else(here: Place, name: str):
    before = everything(here.path)
    with pytest.raises(qdelta.Error):
        inventory.remove(name)
    assert everything(here.path) == before


# ---------------------------------------------------------------------------------------- verify


def bad(here: Place, model: object = NAME) -> dict[str, str]:
    result = verify(model)
    assert result.ok == (not result.bad)
    return {file.path.name: file.problem or "" for file in result.bad}


def test_verify_of_a_whole_model(here: Place):
    result = verify(NAME)
    assert result.ok
    names = {file.path.name for file in result.files}
    assert {"config.json", "README.md", converted(here).name} <= names
    assert sum(name.startswith("model.safetensors-") for name in names) == 2
    done = here.command("verify", NAME)
    assert "0 bad" in done.stderr and done.stdout == ""
    snapshot = hub_cache.snapshot(NAME)
    assert verify(snapshot).ok and verify(snapshot / "config.json").ok
    assert len(verify(snapshot / "config.json").files) == 1
    assert verify(converted(here)).ok


DAMAGE: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "weights": (lambda h: flip(shard(h)), "model.safetensors-00001", "sha256 is"),
    "a text": (lambda h: flip(small(h)), "config.json", "git-sha1 is"),
    "cut": (lambda h: os.truncate(shard(h), 100), "model.safetensors-00001", "sha256 is"),
    "no blob": (lambda h: shard(h).unlink(), "model.safetensors-00001", "missing"),
    "no entry": (lambda h: entry(h).unlink(), "model.safetensors-00001", "missing"),
    "converted": (lambda h: flip(converted(h)), "models--Owner--Tiny", "hash"),
    "converted header": (lambda h: flip(converted(h), 100), "models--Owner--Tiny", ""),
}


def small(here: Place) -> Path:
    return (hub_cache.snapshot(NAME) / "config.json").resolve()


def entry(here: Place) -> Path:
    return hub_cache.snapshot(NAME) / "model.safetensors-00001-of-00002.safetensors"


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_finds_damage(here: Place, what: str):
    damage, name, problem = DAMAGE[what]
    damage(here)
    found = bad(here)
    assert any(file.startswith(name) and problem in why for file, why in found.items()), found
    done = here.command("verify", NAME, status=1)
    assert name in done.stdout and "Traceback" not in done.stderr
    data = json.loads(here.command("verify", NAME, "--json", status=1).stdout)
    assert data["ok"] is False and any(file["problem"] for file in data["files"])


def test_a_converted_file_of_other_sources(here: Place):
    status = shard(here).stat()
    os.utime(shard(here), ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    found = bad(here)
    assert list(found) == [converted(here).name] and "made from other files" in found.popitem()[1]


def test_verify_online(place: Place, hub: Hub):
    """The hub's word counts, also against the names in the cache."""
    place.command("pull", NAME)
    (hub.folder / "LICENSE").write_text("other words")
    place.command("verify", NAME)
    done = place.command("verify", NAME, "--online", status=1)
    assert "LICENSE: git-sha1 is" in done.stdout and done.stdout.count("\n") == 1


def test_verify_of_a_download_elsewhere(place: Place, hub: Hub, tmp_path: Path):
    """What the client downloads to a folder has its hashes in hidden notes."""
    folder = tmp_path / "elsewhere"
    place.python(f"""
        import huggingface_hub as h
        h.snapshot_download({NAME!r}, local_dir={str(folder)!r})
    """)
    result = verify(folder)
    assert result.ok and len(result.files) == len(hub.files())
    flip(folder / "tokenizer.json")
    assert [file.path.name for file in verify(folder).bad] == ["tokenizer.json"]


def test_verify_of_what_is_not_there_or_has_no_hash(here: Place, tmp_path: Path):
    with pytest.raises(qdelta.FileAccessError, match="nothing of it is here"):
        verify("Owner/Absent")
    with pytest.raises(qdelta.FileAccessError, match="no such file"):
        verify(tmp_path / "absent")
    with pytest.raises(qdelta.ArgumentError, match="nothing says what its hashes"):
        verify(make_checkpoint(tmp_path / "plain"))
    with pytest.raises(qdelta.ArgumentError, match="empty"):
        verify("")


# ---------------------------------------------------------------------------- export and import


@pytest.mark.parametrize("quant", [None, "w4", "w8"])
def test_a_model_moves_to_a_computer_without_network(here: Place, tmp_path: Path, quant: str):
    options = {} if quant is None else {"quant": quant}
    expected = here.tokens(**options)
    out = tmp_path / "stick" / "model"
    args = () if quant is None else ("--quant", quant)
    sent = here.command("export", NAME, out, "--offline", *args).stdout
    manifest = archive.read_manifest(out)
    assert (manifest.name, manifest.revision) == (NAME, COMMIT)
    names = {file.name for file in manifest.files}
    assert {"README.md", "LICENSE", "config.json", "tokenizer.json"} <= names
    assert names | {archive.MANIFEST} == {path.name for path in out.iterdir()}
    for file in manifest.files:
        content = (out / file.name).read_bytes()
        assert len(content) == file.bytes and hashlib.sha256(content).hexdigest() == file.sha256
    moved = (tmp_path / "stick").rename(tmp_path / "other-stick") / "model"
    other = Place(tmp_path / "other")
    assert other.tokens(moved) == expected
    assert other.command("import", moved).stdout == sent
    assert other.command("verify", moved).stdout == sent
    shutil.rmtree(moved)
    assert other.tokens() == expected
    other.command("verify", NAME)
    # And on from there.
    again = tmp_path / "again"
    assert other.command("export", NAME, again).stdout.startswith("manifest sha256 ")
    assert archive.read_manifest(again).files == manifest.files


def test_an_export_of_a_plain_folder_and_of_a_converted_file(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "mine", shards=2)
    (folder / "notes.txt").write_text("private")
    (folder / "unrelated.safetensors").write_bytes(b"")
    out = keep.export(folder, tmp_path / "a")
    assert not {"notes.txt", "unrelated.safetensors"} & {path.name for path in out.iterdir()}
    with pytest.raises(qdelta.ArgumentError, match="no name; give one"):
        keep.import_folder(out, cache=tmp_path / "cache")
    file = tmp_path / "one.w4.safetensors"
    weights.convert(_native.Checkpoint(str(folder)), folder, file, quant="w4")
    out = keep.export(file, tmp_path / "b")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert qdelta.load(out).native.quant == "w4"
    assert keep.import_folder(out, name="me/mine", cache=tmp_path / "cache") == "me/mine"
    loaded = qdelta.load("me/mine", cache=tmp_path / "cache", offline=True)
    assert loaded.native.quant == "w4"
    with pytest.raises(qdelta.ArgumentError, match="already converted"):
        keep.export(out, tmp_path / "c", quant="w8")
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    keep.export("demo", tmp_path / "out")  # an empty folder is free
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("words")
    for taken in (tmp_path / "out", tmp_path / "full", tmp_path / "full" / "precious"):
        before = everything(tmp_path)
        with pytest.raises(qdelta.ArgumentError, match="not an empty folder"):
            keep.export("demo", taken)
        assert everything(tmp_path) == before


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "longer"])
def test_a_damaged_folder_is_not_imported(tmp_path: Path, how: str):
    out, cache = keep.export("demo", tmp_path / "out", quant="w8"), tmp_path / "cache"
    keep.import_folder(out, name="me/demo", cache=cache)
    before = everything(cache)
    file = out / "model.w8.safetensors"
    if how == "flipped":
        flip(file, 10_000)
    elif how == "cut":
        os.truncate(file, 100)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(qdelta.FileError, match=r"nothing was imported: model\.w8\.safetensors"):
        keep.import_folder(out, name="me/demo", cache=cache)
    assert everything(cache) == before
    assert [check.path.name for check in verify(out).bad] == ["model.w8.safetensors"]
    assert verify("me/demo", cache=cache).ok


def test_files_that_the_manifest_does_not_know(tmp_path: Path):
    """They would be read as part of the model, and nobody vouches for them."""
    out = keep.export("demo", tmp_path / "out")
    (out / ".DS_Store").write_text("a file manager's")
    assert verify(out).ok
    (out / "vocab.json").write_text("{}")
    assert [check.path.name for check in verify(out).bad] == ["vocab.json"]
    keep.import_folder(out, name="me/demo", cache=tmp_path / "cache")
    assert not (archive.kept_folder("me/demo", tmp_path / "cache") / "vocab.json").exists()


def changed(**changes: object) -> Callable[[dict], object]:
    return lambda manifest: {**manifest, **changes}


def with_file(**changes: object) -> Callable[[dict], object]:
    return lambda manifest: {
        **manifest, "files": [{**manifest["files"][0], **changes}, *manifest["files"][1:]]
    }  # fmt: skip


HOSTILE: dict[str, Callable[[dict], object]] = {
    "a list": lambda manifest: [],
    "a number": lambda manifest: 7,
    "another format": changed(format=2),
    "no format": lambda manifest: {k: v for k, v in manifest.items() if k != "format"},
    "more keys": changed(extra=1),
    "model outside": changed(model="../../x"),
    "model absolute": changed(model="/etc/passwd"),
    "model unknown": changed(model="other.safetensors"),
    "model a number": changed(model=1),
    "name a list": changed(name=[]),
    "files a text": changed(files="x"),
    "files of numbers": changed(files=[1]),
    "file outside": with_file(name="../x"),
    "file absolute": with_file(name="/etc/passwd"),
    "file with drive": with_file(name="C:x"),
    "file with backslash": with_file(name="..\\x"),
    "file is folder": with_file(name=".."),
    "file is nothing": with_file(name=""),
    "file is the manifest": with_file(name=archive.MANIFEST),
    "file a number": with_file(name=3),
    "bytes a text": with_file(bytes="many"),
    "bytes true": with_file(bytes=True),
    "hash short": with_file(sha256="ab"),
    "hash a number": with_file(sha256=1),
    "file twice": lambda m: {**m, "files": [m["files"][0], *m["files"]]},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_manifests(tmp_path: Path, how: str):
    out = keep.export("demo", tmp_path / "out")
    path = out / archive.MANIFEST
    path.write_text(json.dumps(HOSTILE[how](json.loads(path.read_text()))))
    for use in (qdelta.load, verify, lambda p: keep.import_folder(p, name="a/b", cache=tmp_path)):
        with pytest.raises(qdelta.FileError, match="not a valid manifest"):
            use(out)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * 2**25])
def test_manifests_that_are_none(tmp_path: Path, content: bytes):
    (tmp_path / archive.MANIFEST).write_bytes(content)
    with pytest.raises(qdelta.FileError, match="not a valid manifest"):
        archive.read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_not_imported(tmp_path: Path):
    with pytest.raises(qdelta.FileError, match="expected a folder made by export"):
        keep.import_folder(make_checkpoint(tmp_path / "m"), name="a/b", cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["demo", "a/b/c", "..", "a/..", "a--b/c", "-a/b", "a b", "x" * 97])
def test_names_that_cannot_be_kept(tmp_path: Path, name: str):
    out = keep.export("demo", tmp_path / "out")
    with pytest.raises(qdelta.ArgumentError):
        keep.import_folder(out, name=name, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_import_left_is_removed(tmp_path: Path):
    out, cache = keep.export("demo", tmp_path / "out"), tmp_path / "cache"
    kept = archive.kept_folder("me/demo", cache)
    own = kept.with_name(f".{kept.name}.0123abcd.part")
    longer = kept.with_name(f".{kept.name}.5-4b.0123abcd.part")  # of the model me/demo.5-4b
    for folder in (own, longer):
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
    keep.import_folder(out, name="me/demo", cache=cache)
    assert kept.is_dir() and not own.exists() and longer.exists()


@pytest.mark.parametrize("command", ["pull", "list", "rm", "verify", "export", "import"])
def test_help(command: str):
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0 and f"  qdelta {command}" in shown.output
