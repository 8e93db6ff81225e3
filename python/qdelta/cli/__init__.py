"""The `qdelta` command."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import warnings
from typing import TextIO

import click

from ..errors import Error
from . import bench, eval, files, keep, plan, talk
from .common import printable

HELP = """Run the Qwen3.5 small models (0.8B, 2B, 4B, 9B) on this computer's CPU.

\b
  qdelta demo                                a story from the toy model inside the package
  qdelta chat Qwen/Qwen3.5-4B                talk to a model, fetched by its name
  qdelta run ./Qwen3.5-0.8B "The sea is"     continue a text
  qdelta plan Qwen/Qwen3.5-9B                what of it fits into memory here?
  qdelta bench --synthetic 0.8B              how fast would that be here?

A MODEL is a name on the Hugging Face Hub, with :TYPE for one of several GGUF files, as
unsloth/Qwen3.5-4B-GGUF:Q4_K_M; a checkpoint folder, a GGUF file, a converted file, a folder that
`qdelta export` made; or "demo".
"""


@click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qdelta")
def cli() -> None:
    pass


for command in (
    talk.demo, talk.run, talk.chat, files.convert, files.inspect, plan.plan, eval.evaluate,
    bench.bench, keep.pull, keep.list_models, keep.rm, keep.verify, keep.export, keep.import_,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Entry point: errors are one line, Ctrl-C and a closed pipe end quietly."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal need not know every character
    warnings.showwarning = _warn
    try:
        status = cli.main(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("qdelta: stopped", err=True)
        _drop_output()
        # The interpreter would wait for threads that still fetch files.
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _drop_output()
        sys.exit(0)
    except (Error, OSError) as error:
        click.echo(f"qdelta: {_line(error)}", err=True)
        _drop_output()
        sys.exit(1)


def _drop_output() -> None:
    """What is still buffered may have nowhere to go; the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning on one line, without the place in the program."""
    click.echo(f"qdelta: warning: {printable(str(message))}", err=True)


def _line(error: Error | OSError) -> str:
    """An error on one line, without the numbers that programs look for."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = re.sub(r" \(os error \d+\)$", "", error.strerror)
        text = f"{error.filename}: {text}" if error.filename else text
    return printable(text)
