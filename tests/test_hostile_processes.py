"""What could end the process, by memory, stack or signal, tried in a process of its own."""

from __future__ import annotations

import pytest

from hostile import INDEX, NAME, OPEN, assert_survives, edit_config, run
from tiny import Container, Stored, make_checkpoint, only_file


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"__metadata__": {"a": ['])
def test_deep_nesting(folder, opening):
    """No stack is deep enough for a million brackets."""
    path = only_file(folder)
    Container.read(path).write(path, opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")
    make_checkpoint(folder, tokenizer=False)
    (folder / "config.json").write_text(opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")
    make_checkpoint(folder, tokenizer=False)
    (folder / INDEX).write_text(opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")


def test_a_million_tensors(folder):
    """A long header is slow at the worst."""
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header |= {f"t{i}": entry for i in range(300_000)}
    container.write(path, header)
    assert_survives(run(OPEN, folder), "fine", "FileError")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": 2**21},
        {"hidden_size": 2**21, "vocab_size": 2**21},
        {"linear_num_value_heads": 2**20, "linear_value_head_dim": 2**20},
        {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20},
        {"linear_conv_kernel_dim": 2**21},
        {"max_position_embeddings": 2**21},
    ],
    ids=str,
)
def test_huge_sizes_allocate_nothing(folder, changes):
    edit_config(folder, **changes)
    assert_survives(run(OPEN, folder, memory=2**30), "FileError", "UnsupportedError", "fine")


def test_empty_matrix_of_endless_rows(folder):
    """A shape of no bytes passes the container; it must not pass the model."""
    path = only_file(folder)
    container = Container.read(path)
    container.tensors[NAME] = Stored("BF16", [2**62, 0], b"")
    container.write(path)
    assert_survives(run(OPEN, folder), "FileError")


@pytest.mark.parametrize("change", ["shorter", "empty", "longer", "gone", "rewritten"])
def test_file_changes_between_opening_and_use(folder, change):
    """A file cut short under a mapping would be a SIGBUS; it is noticed before it is read."""
    code = """
        import os, time
        path, change = sys.argv[2:]
        checkpoint = _native.Checkpoint(sys.argv[1])
        size = os.path.getsize(path)
        time.sleep(0.02)
        if change == "gone":
            os.unlink(path)
        elif change == "rewritten":
            raw = open(path, "rb").read()
            open(path, "wb").write(raw)
        else:
            os.truncate(path, {"shorter": size // 2, "empty": 0, "longer": size + 4096}[change])
        try:
            _native.Model(checkpoint, threads=1).session().feed(np.array([1, 2], np.int32))
            print("fine")
        except qdelta.Error as error:
            print(type(error).__name__, error)
    """
    path = only_file(folder)
    done = run(code, folder, path, change)
    kinds = {"gone": ("FileAccessError", "FileError", "fine")}.get(change, ("FileError",))
    assert_survives(done, *kinds)
    if not done.stdout.startswith("fine"):
        assert path.name in done.stdout


def test_random_damage(folder):
    """A few bytes changed anywhere: an error or a model, never a crash."""
    code = """
        import pathlib, random
        path = pathlib.Path(sys.argv[2])
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        rng = random.Random(7)
        for _ in range(300):
            raw = bytearray(good)
            for _ in range(rng.choice([1, 1, 2, 8])):
                raw[rng.randrange(header)] = rng.choice(b'0123456789[]{},:"\\\\ \\xff-e.')
            path.write_bytes(raw)
            try:
                session = _native.Model(_native.Checkpoint(sys.argv[1]), threads=1).session()
                session.feed(np.array([1, 2], np.int32))
            except qdelta.Error as error:
                assert str(error)
        print("done")
    """
    assert_survives(run(code, folder, only_file(folder)), "done")
