"""The command line as a person or a script meets it: one process per case."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qdelta
from qdelta.cli import cli
from tiny import make_checkpoint

COMMANDS = (
    "bench", "chat", "convert", "demo", "eval", "export", "import", "inspect", "list", "plan",
    "pull", "rm", "run", "verify",
)  # fmt: skip
# Field names of llama-bench, which scripts that compare the two rely on.
LLAMA_BENCH = {
    "build_commit", "build_number", "cpu_info", "backends", "model_filename", "model_type",
    "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v",
    "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
    "samples_ns", "samples_ts",
}  # fmt: skip


# So hot that the end token is one of thousands.
HOT = ("--temperature", 100, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", 1)


def qdelta_command(*args: object) -> list[str]:
    return [sys.executable, "-m", "qdelta", *map(str, args)]


def run(
    *args: object, stdin: str | bytes = "", status: int = 0, **settings: str
) -> subprocess.CompletedProcess[str]:
    """A command with its output in pipes."""
    done = subprocess.run(
        qdelta_command(*args),
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **settings},
        check=False,
    )
    text = subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )
    assert text.returncode == status, (text.returncode, text.stdout[-500:], text.stderr[-2000:])
    for output in (text.stdout, text.stderr):
        assert "\x1b" not in output and "\r" not in output, "colours or bars in a pipe"
        assert "Traceback" not in output
    return text


def fails(*args: object, **options: str | bytes) -> str:
    """The one line of a failing command."""
    done = run(*args, status=1, **options)
    assert done.stdout == ""
    assert done.stderr.startswith("qdelta: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def converted(model: Path) -> Path:
    out = model.parent / "model.w8.safetensors"
    run("convert", model, "--quant", "w8", "-o", out)
    return out


# ----------------------------------------------------------------------------------------- help


def test_all_commands_are_known():
    assert tuple(sorted(cli.commands)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str):
    for flag in ("--help", "-h"):
        done = run(command, flag)
        assert f"\n    qdelta {command}" in done.stdout, "no example on a line of its own"
        assert "Usage:" in done.stdout and done.stderr == ""


def test_the_general_help():
    text = run("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert run("--version").stdout.strip().endswith(qdelta.__version__)


def test_no_command_at_all():
    done = run(status=2)
    assert "Usage:" in done.stdout + done.stderr


# ----------------------------------------------------------------------------- demo, run, chat


def test_the_demo_tells_the_same_story_each_time():
    first, second = run("demo", "-t", 1), run("demo", "-t", 2)
    assert first.stdout == second.stdout
    assert first.stdout.startswith("Once upon a time") and first.stdout.endswith("\n")
    assert len(first.stdout.split()) > 60
    assert first.stderr == ""


def test_the_demo_goes_on_from_a_beginning():
    options = ("One day, a cat", "-n", 12, "--temperature", 1, "--seed")
    stories = [run("demo", *options, seed).stdout for seed in (1, 1, 2)]
    assert stories[0] == stories[1] != stories[2]
    assert all(story.startswith("One day, a cat") for story in stories)


def test_raw_continues_and_chat_answers():
    raw = run("run", "demo", "Once upon a time", "--raw", "-n", 16, "--temperature", 0)
    model = qdelta.load("demo")
    assert (
        raw.stdout == model.generate("Once upon a time", max_tokens=16, temperature=0).text + "\n"
    )
    answer = run("run", "demo", "Tell me a story.", "-n", 16, "--temperature", 0, "--system", "Hi")
    messages = [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": "Tell me a story."},
    ]
    assert answer.stdout == model.chat(messages, max_tokens=16, temperature=0).text + "\n"


def test_a_prompt_from_standard_input():
    options = ("--raw", "-n", 8, "--temperature", 0)
    piped = run("run", "demo", "-", *options, stdin="One day, a dog\nran. Ünd")
    assert piped.stdout == run("run", "demo", "One day, a dog\nran. Ünd", *options).stdout


def test_reasoning_stays_out_of_standard_output():
    done = run("run", "demo", "Hello", "--think", "-n", 12, "--temperature", 0)
    expected = qdelta.load("demo").chat("Hello", think=True, max_tokens=12, temperature=0)
    assert expected.reasoning
    assert done.stderr.strip() == expected.reasoning.strip()
    assert done.stdout == expected.text + "\n"
    done = run("run", "demo", "Hello", "--no-think", "-n", 4)
    assert done.stderr == ""


def test_speeds_if_asked_for():
    done = run("run", "demo", "Hello", "-n", 4, "-v", "--temperature", 0)
    assert "tokens read at" in done.stderr and done.stderr.count("\n") == 1


def test_options_of_loading_arrive(model: Path, tmp_path: Path):
    options = ("--quant", "w8", "--cache", tmp_path, "--kv", "f32", "-t", 1, "--ctx", 64)
    run("run", model, "a", "-n", 2, "--offline", "--isa", "portable", *options)
    assert list(tmp_path.glob("*.w8.safetensors"))
    message = fails("run", model, "word " * 200, "-n", 2, "--ctx", 64)
    assert "the context holds 64" in message


def test_a_conversation_through_a_pipe():
    lines = ["Hello", "Tell me\\", "a story.", "/quit", "never read"]
    done = run("chat", "demo", "-n", 12, "--temperature", 0, stdin="\n".join(lines))
    model = qdelta.load("demo")
    messages: list = [{"role": "user", "content": "Hello"}]
    first = model.chat(messages, max_tokens=12, temperature=0)
    messages += [first, {"role": "user", "content": "Tell me\na story."}]
    second = model.chat(messages, max_tokens=12, temperature=0)
    assert done.stdout == f"{first.text}\n{second.text}\n"


def test_reset_and_system_begin_anew():
    asked = "Tell me a story."
    lines = ["/system Be brief.", asked, "/reset", asked, "/system", asked]
    done = run("chat", "demo", "-n", 12, "--temperature", 0, stdin="\n".join(lines))
    model = qdelta.load("demo")
    user = {"role": "user", "content": asked}
    system = {"role": "system", "content": "Be brief."}
    with_system = model.chat([system, user], max_tokens=12, temperature=0).text
    without = model.chat([user], max_tokens=12, temperature=0).text
    assert done.stdout == f"{with_system}\n{with_system}\n{without}\n"
    assert "forgotten" in done.stderr


def test_thinking_and_help_inside():
    lines = ["/think on", "Hello", "/think off", "/think auto", "/think", "/help", "/nonsense"]
    done = run("chat", "demo", "-n", 6, "--temperature", 0, stdin="\n".join(lines))
    expected = qdelta.load("demo").chat("Hello", think=True, max_tokens=6, temperature=0)
    assert expected.reasoning and expected.reasoning.strip() in done.stderr
    for words in ("thinking: on", "thinking: off", "thinking: as the model card says"):
        assert words in done.stderr
    assert done.stderr.count("/reset ") == 2  # the list, once for /help and once for /nonsense


def test_a_conversation_that_outgrows_the_context():
    lines = ["word " * 200, "Hi"]
    done = run("chat", "demo", "--ctx", 64, "-n", 4, "--temperature", 0, stdin="\n".join(lines))
    assert "/reset" in done.stderr and "64" in done.stderr
    expected = qdelta.load("demo").chat("Hi", max_tokens=4, temperature=0)
    assert done.stdout == expected.text + "\n", "the question that failed is forgotten"


def test_no_input_ends_a_conversation():
    assert run("chat", "demo").stdout == ""


# -------------------------------------------------------------------------- convert and inspect


def test_convert_makes_a_file_that_answers(converted: Path, tmp_path: Path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(converted.read_bytes())
    assert run("run", moved, "ab", "-n", 3, "--temperature", 0).stdout
    assert qdelta.load(moved).native.quant == "w8"


def test_inspect_for_people(model: Path, converted: Path):
    text = run("inspect", model, "--ctx", 100).stdout
    for words in ("quant none", "hidden_size", "BF16", "Memory for a context of 100", "total"):
        assert words in text
    assert "embed_tokens" not in text
    text = run("inspect", converted, "--tensors", "--verify").stdout
    assert "hash verified" in text and "quant w8" in text
    for name, *_ in qdelta._native.Checkpoint(str(converted)).tensors():
        assert name in text, "a name is cut"


def test_inspect_for_programs(model: Path, converted: Path):
    for path, quant in ((model, "none"), (converted, "w8")):
        report = json.loads(run("inspect", path, "--json", "--ctx", 128).stdout)
        assert report["quant"] == quant
        assert report["memory"]["ctx"] == 128
        parts = [report["memory"][part] for part in ("weights", "kv", "state", "scratch")]
        assert report["memory"]["total"] == sum(parts) > 0
        assert report["config"]["hidden_size"] == 32
        assert sum(entry["tensors"] for entry in report["types"].values()) == len(report["tensors"])
    assert json.loads(run("inspect", converted, "--json", "--verify").stdout)["verified"] is True


def test_inspect_says_who_extends_the_context(model: Path, tmp_path: Path):
    def lines(path: Path, *options: object) -> str:
        return run("inspect", path, *options).stdout

    extended = tmp_path / "extended"
    shutil.copytree(model, extended)
    config = json.loads((extended / "config.json").read_text())
    context = config["text_config"]["max_position_embeddings"]
    rope = config["text_config"]["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": context}
    (extended / "config.json").write_text(json.dumps(config))

    assert f"context {context}\n" in lines(model)
    assert f"context {2 * context} (YaRN factor 2 of --yarn)\n" in lines(model, "--yarn", 2)
    said = "YaRN factor 4 of config.json"
    assert f"context {4 * context} ({said})\n" in lines(extended)
    two = f"context {2 * context} (YaRN factor 2 of --yarn, instead of {said})\n"
    assert two in lines(extended, "--yarn", 2)
    assert f"context {context} (--yarn 1, instead of {said})\n" in lines(extended, "--yarn", 1)
    plan = lines(extended, "--ctx", 3 * context)
    assert f"Memory for a context of {3 * context}" in plan
    report = json.loads(run("inspect", extended, "--yarn", 2, "--json").stdout)
    assert report["context"] == {"tokens": 2 * context, "yarn": 2.0, "config_yarn": 4.0}
    assert "yarn is 0.5" in fails("run", model, "ab", "--yarn", 0.5)
    assert "--yarn FACTOR" in run("run", "--help").stdout


def test_the_number_of_parameters_is_that_of_the_tensors(model: Path):
    report = json.loads(run("inspect", model, "--json").stdout)
    assert report["parameters"] == sum(math.prod(t["shape"]) for t in report["tensors"])


def test_names_are_no_markup(model: Path, tmp_path: Path):
    odd = tmp_path / "[bold]model"
    odd.symlink_to(model, target_is_directory=True)
    assert "[bold]model" in run("inspect", odd).stdout


def test_verify_finds_a_flipped_bit(converted: Path, tmp_path: Path):
    content = bytearray(converted.read_bytes())
    content[-100] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    assert "damaged.safetensors" in fails("inspect", damaged, "--verify")


def test_verify_is_for_converted_files(model: Path):
    assert "--verify is for converted files" in fails("inspect", model, "--verify")


# ------------------------------------------------------------------------------- eval and bench


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once upon a time, there was a little girl who liked to play. " * 20)
    return path


def test_eval(text_file: Path):
    report = json.loads(run("eval", "demo", "--text", text_file, "--window", 64, "--json").stdout)
    expected = qdelta.load("demo").perplexity(text_file.read_text(), window=64)
    assert math.isclose(report["perplexity"], expected.perplexity, rel_tol=1e-5)
    assert report["windows"] == expected.windows and report["scored"] == expected.scored
    assert report["tokens_per_s"] > 0
    piped = run("eval", "demo", "--text", "-", "--window", 64, stdin=text_file.read_text())
    assert f"perplexity {expected.perplexity:.4f}" in piped.stdout
    assert piped.stderr == ""


def test_eval_of_what_is_no_text(tmp_path: Path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    assert "latin1.txt: not UTF-8 at byte 3" in fails("eval", "demo", "--text", path)
    path.write_text("short")
    assert "shorter than one window" in fails("eval", "demo", "--text", path)
    run("eval", "demo", "--text", tmp_path / "absent", status=2)


BENCH = ("bench", "demo", "-p", "8,16", "-n", "4", "-d", "0,32", "-t", "1,2", "-r", 2, "-o")
TESTS = ["pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"] * 2


def test_bench_json():
    rows = json.loads(run(*BENCH, "json").stdout)
    assert len(rows) == len(TESTS)
    for row in rows:
        assert set(row) >= LLAMA_BENCH
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        assert row["avg_ts"] > 0 and row["model_filename"] == "demo"
        assert (row["n_prompt"] == 0) != (row["n_gen"] == 0)
    assert [row["n_threads"] for row in rows] == [1] * 6 + [2] * 6


def test_bench_jsonl():
    rows = [json.loads(line) for line in run(*BENCH, "jsonl").stdout.splitlines()]
    assert len(rows) == len(TESTS) and set(rows[0]) >= LLAMA_BENCH


def test_bench_csv():
    rows = list(csv.DictReader(io.StringIO(run(*BENCH, "csv").stdout)))
    assert len(rows) == len(TESTS) and set(rows[0]) >= LLAMA_BENCH
    assert len(json.loads(rows[0]["samples_ns"])) == 2


def test_bench_md():
    head, rule, *rows = run(*BENCH, "md").stdout.splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert {"model", "size", "params", "threads", "test", "t/s"} <= set(columns)
    assert set(rule) <= set("| -:")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[columns.index("test")] for row in cells] == TESTS


def test_bench_usage():
    for args in ((), ("demo", "--synthetic", "0.8B"), ("demo", "-p", "0", "-n", "0"),
                 ("demo", "-t", "0"), ("demo", "-p", "a"), ("demo", "-n", "-1")):  # fmt: skip
        done = run("bench", *args, status=2)
        assert done.stdout == "" and "Usage:" in done.stderr


def test_synthetic_models(monkeypatch: pytest.MonkeyPatch):
    """The path of --synthetic, at a size that is made in a moment."""
    from click.testing import CliRunner

    from qdelta import sizes

    small = {
        **sizes.SIZES["0.8B"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "vocab_size": 512,
    }
    monkeypatch.setitem(sizes.SIZES, "0.8B", small)
    args = ["bench", "--synthetic", "0.8B", "-p", "4", "-n", "2", "-r", "1", "-o", "jsonl"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(4, 0), (0, 2)]
    assert rows[0]["quant"] == "balanced" and rows[0]["model_filename"] == "synthetic 0.8B"
    assert rows[1]["gb_per_s"] > 0 == rows[0]["gb_per_s"]
    assert all(row["head"] == "full" and row["yarn"] is None for row in rows)
    # The context of the config is extended, and the head is that which was asked for.
    small["max_position_embeddings"] = 64
    args += ["-d", "100", "--quant", "w4", "--head", "screened"]
    assert isinstance(CliRunner().invoke(cli, args).exception, qdelta.ContextError)
    result = CliRunner().invoke(cli, [*args, "--yarn", "4"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert all(row["head"] == "screened" and row["yarn"] == 4 for row in rows)
    result = CliRunner().invoke(cli, ["bench", "demo", *args[3:], "--yarn", "0.5"])
    assert isinstance(result.exception, qdelta.ArgumentError)


# --------------------------------------------------------------------------- errors and signals


def test_errors_are_one_line(tmp_path: Path, model: Path):
    assert "no such file or folder" in fails("run", "no/such/model", "Hi")
    absent = tmp_path / "absent.safetensors"
    assert f"{absent}: No such file" in fails("inspect", absent)
    assert "`foo` is not available" in fails("run", "demo", "Hi", "--isa", "foo")
    assert "preset" in fails("run", "demo", "Hi", "--preset", "nonsense")
    assert "prompt: empty" in fails("run", "demo", "", "--raw")
    assert "not UTF-8" in fails("run", "demo", "-", stdin=b"\xff")
    assert "absent" in fails("convert", model, "-o", tmp_path / "absent" / "out.safetensors")
    (model.parent / "words.txt").write_text("words")
    assert "not a converted file" in fails("convert", model, "-o", model.parent / "words.txt")
    (tmp_path / "file").write_text("")
    options = ("--quant", "w8", "--cache", tmp_path / "file" / "x")
    assert "QDELTA_CACHE" in fails("run", model, "Hi", *options)
    # What would steer the terminal is shown, not sent.
    assert r"a\x1b[2J.gguf: No such file" in fails("inspect", tmp_path / "a\x1b[2J.gguf")


def test_wrong_usage():
    for args in (
        ("run", "demo"), ("run", "demo", "x", "--raw", "--think"), ("demo", "-t", "0"),
        ("nonsense",), ("run", "demo", "x", "--temperature", "-1"), ("convert", "demo"),
        ("run", "demo", "x", "--nonsense"), ("inspect",),
    ):  # fmt: skip
        done = run(*args, status=2)
        assert done.stdout == "" and "Usage:" in done.stderr


def test_mistakes_about_files_say_what_to_do(tmp_path: Path):
    out = tmp_path / "out.safetensors"
    for args, words in (
        (("convert", "demo", "-o", tmp_path / "x.gguf"), "give --to gguf, or another name"),
        (("convert", "demo", "-o", out, "--recipe", "w5"), "'w5' is no file, and no recipe: bal"),
    ):
        assert words in run(*args, status=2).stderr
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for args, words in (
        (("convert", "demo", "-o", tmp_path / "no" / "x.safetensors"), "no: no such folder"),
        (("inspect", tmp_path), "for a GGUF file in it name the file, as a.gguf"),
        (("pull", "demo"), "'demo': is on this computer, and no name on the hub (as Qwen/"),
        (("inspect", "Qwen3.5-4B"), "no such file or folder, and no name on the hub (as Qwen/"),
        (("inspect", "./nothing"), "no such file or folder, and no name on the hub (as Qwen/"),
        (("pull", "a/b:Q8_0", "--only", "gguf:Q8_0"), "names a GGUF file already"),
    ):
        assert words in run(*args, status=1).stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c():
    process = subprocess.Popen(
        qdelta_command("run", "demo", "Once", "--raw", "-n", 10**6, *HOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize(
    "args", [("eval", "demo", "--text"), ("convert", "demo", "-o", "x.safetensors", "--calibrate")]
)
def test_ctrl_c_is_one_line(args: tuple[str, ...], tmp_path: Path):
    text = tmp_path / "text"
    os.mkfifo(text)
    command = qdelta_command(*args, text)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path)
    with text.open("wb"):  # waits until the command reads
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == b"qdelta: stopped", err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ")
@pytest.mark.parametrize(
    "args", [("demo",), ("run", "demo", "Once", "--raw", "-n", 400), ("inspect", "demo", "--json")]
)
def test_a_closed_pipe_is_quiet(args: tuple[object, ...]):
    process = subprocess.Popen(
        qdelta_command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("args", [("demo", "-n", 3), ("inspect", "demo", "--json")])
def test_a_full_disk(args: tuple[object, ...]):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            qdelta_command(*args), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "qdelta: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str):
    command = f"{sys.executable} -m qdelta chat demo -n 3 {closed}"
    assert (
        subprocess.run(command, shell=True, input=b"Hi\n", timeout=60, check=False).returncode == 0
    )


def test_a_terminal_with_few_characters():
    done = run("inspect", "demo", PYTHONIOENCODING="ascii")
    assert "hidden_size" in done.stdout


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        import pty

        self.end, inner = pty.openpty()
        self.process = subprocess.Popen(
            qdelta_command(*args), stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def read(self) -> bool:
        """Wait for more output; False at its end."""
        try:
            part = os.read(self.end, 4096)
        except OSError:  # what Linux says when the other side is closed
            return False
        self.seen += part
        return bool(part)

    def read_until(self, text: bytes) -> None:
        while text not in self.seen:
            assert self.read(), self.seen

    def finish(self) -> int:
        while self.read():
            pass
        os.close(self.end)
        return self.process.wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_prompts_and_speeds():
    terminal = Terminal("chat", "demo", "-n", 4, "--temperature", 0)
    terminal.type("Hello\n/quit\n")
    assert terminal.finish() == 0
    for words in (b"/help for help", b"> ", b"tokens read at"):
        assert words in terminal.seen


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_not_the_conversation():
    terminal = Terminal("chat", "demo", "-n", 10**6, *HOT)
    terminal.read_until(b"> ")
    terminal.type("Hello\n")
    terminal.read_until(b"Hello")
    before = len(terminal.seen)
    while len(terminal.seen) < before + 100:
        assert terminal.read()
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until(b"(stopped")
    terminal.type("/quit\n")
    assert terminal.finish() == 0
