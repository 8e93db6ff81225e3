"""What the tests of damaged and malicious files share."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import qdelta
from qdelta import _native
from tiny import TEXT_PREFIXES

PREFIX = TEXT_PREFIXES[0]
LAYER = f"{PREFIX}layers.0."
FULL = f"{PREFIX}layers.3."
INDEX = "model.safetensors.index.json"
NAME = f"{LAYER}mlp.up_proj.weight"  # BF16 [48, 32], 3072 bytes


def open_model(path: Path) -> None:
    """Open and bind: everything that may look at the files."""
    session = _native.Model(_native.Checkpoint(str(path)), threads=1).session()
    session.feed(np.array([1, 2, 3], np.int32))


def refuses(path: Path, *words: str, kind=(qdelta.FileError, qdelta.UnsupportedError)) -> str:
    """The message with which a checkpoint is refused; it has all the words."""
    with pytest.raises(kind) as caught:
        open_model(path)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{message!r} lacks {word!r}"
    return message


def edit_config(folder: Path, **changes) -> None:
    """Change text fields of config.json; None removes one, `rope__x` changes a rope field."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        fields = config["text_config"]
        if key.startswith("rope__"):
            fields, key = fields["rope_parameters"], key.removeprefix("rope__")
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    path.write_text(json.dumps(config))


def run(code: str, *args: object, memory: int = 2**31) -> subprocess.CompletedProcess:
    """Python code in a process with an upper bound to its memory, ended after a minute."""
    head = """
        import sys
        import numpy as np
        import qdelta
        from qdelta import _native
        try:
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        except ImportError:
            pass
    """
    program = textwrap.dedent(head).replace("MEMORY", str(memory)) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


OPEN = """
    try:
        session = _native.Model(_native.Checkpoint(sys.argv[1]), threads=1).session()
        session.feed(np.array([1, 2], np.int32))
        print("fine")
    except qdelta.Error as error:
        print(type(error).__name__, error)
"""


def assert_survives(done: subprocess.CompletedProcess, *kinds: str) -> None:
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.startswith(kinds), done.stdout[:500]
