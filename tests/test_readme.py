"""The README's examples run, and what it names is there."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdelta.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HUB_NAME = re.compile(r'"Qwen/Qwen3\.5-[\w.]+"')


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str):
    """Each block runs alone; only the model is a smaller one."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(HUB_NAME.sub('"demo"', code), "README.md", "exec"), {"__name__": "readme"})
    assert printed.getvalue().strip()


@pytest.mark.parametrize("command", commands())
def test_commands(command: str):
    """Scripts are there and can be run; options and arguments of `qdelta` are understood."""
    program, *args = shlex.split(command)
    if program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK) and sys.platform != "win32"
        return
    assert program == "qdelta"
    name, *rest = args
    with cli.commands[name].make_context(name, list(rest)) as context:
        assert context.params


def test_inspect_is_as_shown():
    assert "qdelta inspect demo" in commands()
    assert CliRunner().invoke(cli, ["inspect", "demo"]).exit_code == 0


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links(target: str):
    assert (ROOT / target).exists()


def test_inline_commands():
    for name in re.findall(r"`qdelta ([a-z]+)", README):
        assert name in cli.commands


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 2 and len(commands()) >= 5
