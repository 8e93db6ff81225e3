"""Commands that generate text: demo, run, chat."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, Error, FileError
from .common import (
    LOADING_NAMES,
    SAMPLING_NAMES,
    given,
    isa_option,
    loading_options,
    read_text,
    sampling_options,
    threads_option,
)

if TYPE_CHECKING:
    from ..llm import Model
    from ..results import Completion, Message

# A beginning that the demo model continues legibly.
DEMO_PROMPT = "Once upon a time, there was a little"
DEMO_TOKENS = 200


@click.command()
@click.argument("prompt", default=DEMO_PROMPT)
@sampling_options
@threads_option
@isa_option
def demo(prompt: str, threads: int | None, isa: str | None, **options: Any) -> None:
    """Tell a story with the toy model inside the package.

    It has 4 million parameters and knows nothing but children's stories; it shows that
    everything works, offline and in a second. PROMPT is the beginning of the story.

    \b
      qdelta demo
      qdelta demo "One day, a small cat named Patch" --seed 7
    """
    from ..loading import load

    settings = given(options, *SAMPLING_NAMES)
    settings.setdefault("max_tokens", DEMO_TOKENS)
    if "temperature" not in settings and "seed" not in settings and options["preset"] == "auto":
        # The same story every time, the one that the model tells best.
        settings["temperature"] = 0.0
    model = load("demo", threads=threads, isa=isa)
    click.echo(prompt, nl=False)
    result = _print_stream(model, prompt, settings)
    _print_speeds(result)


@click.command()
@click.argument("model_name", metavar="MODEL")
@click.argument("prompt")
@loading_options
@sampling_options
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat format.")
@click.option("--think/--no-think", default=None, help="Reason before answering, or not.")
@click.option("--system", "system_text", help="System message.")
@click.option("-v", "--verbose", is_flag=True, help="Speeds on standard error, in a pipe too.")
def run(
    model_name: str,
    prompt: str,
    raw: bool,
    think: bool | None,
    system_text: str | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, or continue it with --raw. A PROMPT of - is read from standard input.

    \b
      qdelta run Qwen/Qwen3.5-4B "Why is the sky blue?"
      qdelta run ./Qwen3.5-0.8B --raw "Once upon a time" -n 64
      git diff | qdelta run Qwen/Qwen3.5-9B - --system "Review this change."
    """
    from ..loading import load

    if prompt == "-":
        prompt = read_text(sys.stdin.buffer, "standard input")
    if raw and (think is not None or system_text is not None):
        raise click.UsageError("--raw goes without --think and --system")
    model = load(model_name, **{name: options[name] for name in LOADING_NAMES})
    settings = given(options, *SAMPLING_NAMES)
    question: Any = prompt
    if not raw:
        system = [{"role": "system", "content": system_text}] if system_text else []
        question = [*system, {"role": "user", "content": prompt}]
        if think is not None:
            settings["think"] = think
    result = _print_stream(model, question, settings)
    _print_speeds(result, always=verbose)


def _print_stream(model: Model, prompt: Any, settings: dict[str, Any]) -> Completion | Message:
    """Print text as it comes; reasoning goes to standard error, dimmed."""
    reasoning = False
    with model.stream(prompt, **settings) as stream:
        for event in stream:
            if event.kind == "reasoning":
                reasoning = True
                click.secho(event.text, dim=True, nl=False, err=True)
            elif event.kind == "text":
                if reasoning:
                    click.echo("\n", err=True)
                    reasoning = False
                click.echo(event.text, nl=False)
        click.echo()
    assert stream.result is not None, "the last event carries the result"
    return stream.result


def _print_speeds(result: Completion | Message, *, always: bool = False) -> None:
    """A line of speeds on standard error, on a terminal or if asked for."""
    if always or sys.stderr.isatty():
        click.secho(_speeds(result), dim=True, err=True)


def _speeds(result: Completion | Message) -> str:
    times, usage = result.timings, result.usage
    return (
        f"[{usage.prompt_tokens} tokens read at {times.prefill_tokens_per_s:.1f}/s, "
        f"{usage.completion_tokens} written at {times.decode_tokens_per_s:.1f}/s, "
        f"first after {times.first_token_s:.2f} s, {result.finish_reason}]"
    )


CHAT_HELP = """\
  /think on|off|auto   reason before answering, or not, or as the model card says
  /reset               forget the conversation
  /system TEXT         begin anew with a system message
  /help                this list
  /quit                leave (Ctrl-D does, too)
End a line with \\ to go on in the next. Ctrl-C stops an answer."""


@click.command()
@click.argument("model_name", metavar="MODEL")
@loading_options
@sampling_options
@click.option("--think/--no-think", default=None, help="Reason before answering, or not.")
@click.option("--system", "system_text", help="System message.")
def chat(model_name: str, think: bool | None, system_text: str | None, **options: Any) -> None:
    """Talk to a model. Type /help inside for what can be done there.

    \b
      qdelta chat Qwen/Qwen3.5-4B
      qdelta chat ./Qwen3.5-9B --quant w8 --think
    """
    from ..loading import load

    model = load(model_name, **{name: options[name] for name in LOADING_NAMES})
    settings = given(options, *SAMPLING_NAMES)
    _enable_line_editing()
    if sys.stdin.isatty():
        click.secho(f"{model_name}: {model!r}; /help for help", dim=True, err=True)
    talk = Conversation(model, settings, think, system_text)
    while (line := _read_turn()) is not None:
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line.strip():
            talk.answer(line)


class Conversation:
    """The state of `qdelta chat`."""

    def __init__(
        self, model: Model, settings: dict[str, Any], think: bool | None, system: str | None
    ) -> None:
        self._model = model
        self._settings = settings
        self._think = think
        self._system = system
        self.messages: list[Any] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; whether to go on."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit", "/bye"):
            return False
        if name == "/reset":
            self.reset()
            click.secho("forgotten", dim=True, err=True)
        elif name == "/system":
            self._system = rest or None
            self.reset()
        elif name == "/think" and rest in ("", "on", "off", "auto"):
            # Without a word it toggles.
            words = {"on": True, "off": False, "auto": None, "": not self._think}
            self._think = words[rest]
            word = {True: "on", False: "off", None: "as the model card says"}[self._think]
            click.secho(f"thinking: {word}", dim=True, err=True)
        else:
            click.secho(CHAT_HELP, dim=True, err=True)
        return True

    def answer(self, text: str) -> None:
        """Print the answer to a message; an error or Ctrl-C leaves the history as it was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        settings = dict(self._settings)
        if self._think is not None:
            settings["think"] = self._think
        try:
            result = _print_stream(self._model, messages, settings)
        except KeyboardInterrupt:
            click.secho("\n(stopped; the last question is forgotten)", dim=True, err=True)
            return
        except ArgumentError as error:
            click.secho(f"{error}", fg="red", err=True)
            return
        except Error as error:
            click.secho(f"{error}; /reset begins anew", fg="red", err=True)
            return
        self.messages = [*messages, result]
        _print_speeds(result)


def _enable_line_editing() -> None:
    """Arrow keys and history at the prompt, where the platform has them."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _read_turn() -> str | None:
    """A message: lines that end in a backslash go on. None at the end of input."""
    lines: list[str] = []
    try:
        while True:
            prompt = ("> " if not lines else "… ") if sys.stdin.isatty() else ""
            line = input(prompt)
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
    except EOFError:
        return "\n".join(lines) if lines else None
    except UnicodeDecodeError as error:
        raise FileError(f"standard input: not UTF-8 at byte {error.start}") from None
    except KeyboardInterrupt:
        # At the prompt Ctrl-C drops the line; Ctrl-D leaves.
        click.echo(err=True)
        return ""
