"""Memory: plans before loading, limits at loading and after, and `qdelta plan`."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import qdelta
from qdelta import _native, memory
from qdelta.cli import cli
from qdelta.sizes import SIZES
from test_model_variants import ROPES, SHAPES
from tiny import make_checkpoint

PARTS = ("weights", "kv", "state", "scratch")


def parts(plan) -> list[int]:
    return [getattr(plan, part) for part in PARTS]


# -------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("quant", ["none", "w8", "w4"])
@pytest.mark.parametrize("kv", ["auto", "f16", "f32", "q8"])
@pytest.mark.parametrize("head", ["full", "screened"])
def test_a_plan_is_what_a_loaded_model_holds(quant, kv, head):
    settings = {"quant": quant, "kv": kv, "ctx": 700, "threads": 2, "head": head}
    plan = qdelta.plan("demo", **settings)
    model = qdelta.load("demo", **settings)
    assert parts(plan) == parts(model.native.memory_plan(700))
    assert (plan.quant, plan.ctx, plan.kv_format) == (quant, 700, model.native.kv)
    assert model.native.memory_held == plan.weights
    session = model.session()
    session.feed([5] * 700)
    assert model.native.memory_held == plan.weights + plan.session
    snapshot = session.snapshot()
    assert snapshot.nbytes == plan.kv + plan.state + 4 * 700
    del session, snapshot
    assert model.native.memory_held == plan.weights


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_alone_gives_the_plan_of_its_files(tmp_path, shape):
    """As for a name on the hub, of which the weights are not here."""
    folder = make_checkpoint(tmp_path / "model", SHAPES[shape], ROPES.get(shape))
    config = json.loads((folder / "config.json").read_text())
    for quant in ("none", "w8", "w4"):
        plan, files = (qdelta.plan(m, quant=quant, ctx=300) for m in (config, folder))
        assert parts(plan) == parts(files)
        assert plan.kv_format == files.kv_format
    checkpoint = _native.Checkpoint(str(folder))
    stored = sum(t[3] for t in checkpoint.tensors() if not t[0].startswith("mtp."))
    # Beside the file's bytes the small tensors are held as f32.
    assert stored <= qdelta.plan(folder, quant="none").weights < 1.2 * stored


def test_types_that_a_config_states():
    config = dict(SIZES["0.8B"])
    two = qdelta.plan(config, quant="none").weights
    for key in ("dtype", "torch_dtype"):
        four = qdelta.plan({**config, key: "float32"}, quant="none").weights
        assert four == pytest.approx(2 * two, rel=0.01)
        # Two small matrices of each layer are kept as they are.
        four = qdelta.plan({**config, key: "float32"}, quant="w4").weights
        assert four == pytest.approx(qdelta.plan(config, quant="w4").weights, rel=0.01)
    with pytest.raises(qdelta.UnsupportedError, match="int8"):
        qdelta.plan({**config, "dtype": "int8"})


def test_the_published_sizes():
    """By hand: weights of 4.5 and 5.5 bits, bytes a token as docs/formats.md has them."""
    small = qdelta.plan(SIZES["0.8B"], quant="w4", ctx=32768)
    assert small.kv_format == "f16"
    assert small.kv == 32768 * 12288
    head = 248320 * 1024
    wanted = (752_393_024 - head) * 4.5 / 8 + head * 5.5 / 8
    assert small.weights == pytest.approx(wanted, rel=0.04)  # some of the layers have more bits
    large = qdelta.plan(SIZES["9B"], ctx=262144, kv="q8", quant="none")
    assert large.kv == 262144 * 17024
    assert large.weights == pytest.approx(2 * 8_953_803_264, rel=0.001)
    assert large.total == large.weights + large.tokenizer + large.kv + large.state + large.scratch


def test_sessions_and_what_fits():
    one, three = (qdelta.plan("demo", sessions=n) for n in (1, 3))
    assert three.total - one.total == 2 * one.session
    assert qdelta.plan("demo", sessions=0).total == one.weights + one.tokenizer
    assert one.fits(one.total) and not one.fits(one.total - 1)
    assert one.fits("1 GB") and not one.fits("1 MB")
    assert one.fits() and not qdelta.plan(SIZES["9B"], sessions=10**6).fits()
    text = str(three)
    for words in ("demo, none, each session of 2048 tokens", "all 3 sessions", "weights", "total"):
        assert words in text
    assert memory.size_text(three.total) in text.splitlines()[-1]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1, "columns"


def test_a_plan_without_quant_is_that_of_load():
    assert qdelta.plan("demo").quant == qdelta.load("demo").native.quant == "none"
    automatic = qdelta.plan(SIZES["0.8B"])
    assert automatic.quant != "none" and automatic.weights < 0.4 * 2 * 752_393_024


def test_settings_of_plans():
    assert qdelta.plan(SIZES["4B"]).ctx == 262144
    assert qdelta.plan(SIZES["4B"], yarn=4).ctx == 4 * 262144
    one, many = (qdelta.plan("demo", threads=n) for n in (1, 9))
    assert many.scratch > one.scratch
    for settings, words in [
        ({"quant": "w5"}, "quant is 'w5'"),
        ({"ctx": 10**6}, "context is 1000000, expected 1 to 2048"),
        ({"kv": "q4"}, "kv is `q4`"),
        ({"yarn": 0.5}, "yarn is 0.5"),
        ({"sessions": -1}, "sessions is -1"),
        ({"sessions": True}, "sessions is True"),
    ]:
        with pytest.raises(qdelta.ArgumentError, match=words):
            qdelta.plan("demo", **settings)
    with pytest.raises(qdelta.FileError, match="is missing"):
        qdelta.plan({"model_type": "qwen3_5_text"})


def test_a_converted_file_has_its_own_format(tmp_path):
    out = tmp_path / "demo.w8.safetensors"
    args = ["convert", "demo", "--quant", "w8", "-o", str(out)]
    assert CliRunner().invoke(cli, args).exit_code == 0
    assert parts(qdelta.plan(out)) == parts(qdelta.plan("demo", quant="w8"))
    with pytest.raises(qdelta.UnsupportedError, match="already converted to w8"):
        qdelta.plan(out, quant="w4")


TOKENIZER_MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import real_tokenizer
import qdelta

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

files = real_tokenizer.files()
qdelta.load("demo").generate("ab", max_tokens=1)  # whatever is imported
before = resident()
tokenizer = qdelta.Tokenizer.from_files(files)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
def test_the_tokenizer_is_about_as_large_as_planned():
    code = TOKENIZER_MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planned = qdelta.plan(SIZES["0.8B"]).tokenizer
    assert planned / 2 < int(done.stdout) < 2 * planned


# -------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5), ("5", 5), ("5 B", 5), ("6 GB", 6 * 10**9), ("6GiB", 6 * 2**30), ("6G", 6 * 10**9),
        ("1.5 kB", 1500), (" 2 mib ", 2 * 2**20), ("1 TB", 10**12), ("0.5 GB", 5 * 10**8),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text, size):
    assert memory.parse_bytes(text, "memory_limit") == size


@pytest.mark.parametrize("wrong", ["", "GB", "6 XB", "-1", "6 GB more", "1e9", 0, -5, 1.5, True])
def test_what_is_no_size(wrong):
    with pytest.raises(qdelta.ArgumentError, match=r"memory_limit is .*, expected bytes"):
        qdelta.load("demo", memory_limit=wrong)


def test_this_computer_has_memory():
    there = memory.usable_memory()
    assert there is not None and there > 1 << 20


# ------------------------------------------------------------------------------------- limits


def test_without_ctx_the_limit_chooses_it():
    whole = qdelta.plan("demo")
    core = whole.weights + whole.session
    assert qdelta.load("demo", memory_limit=core).context == 2048
    model = qdelta.load("demo", memory_limit=core - 1)
    assert 0 < model.context < 2048
    held = lambda n: sum(parts(model.native.memory_plan(n)))  # noqa: E731
    assert held(model.context) < core <= held(model.context + 1)
    # All of it can be used.
    session = model.session()
    session.feed([7] * model.context)
    assert model.native.memory_held == held(model.context)
    with pytest.raises(qdelta.ContextError):
        session.feed([7])


def test_a_context_beyond_the_limit(tmp_path):
    plan = qdelta.plan("demo", ctx=2048, quant="w8")
    limit = plan.weights + plan.session - 1
    with pytest.raises(qdelta.MemoryLimitError) as caught:
        # Told before the long work of converting.
        qdelta.load("demo", quant="w8", ctx=2048, memory_limit=limit, cache=tmp_path / "cache")
    error, text = caught.value, str(caught.value)
    assert (error.needed, error.limit) == (limit + 1, limit)
    assert isinstance(error, MemoryError) and isinstance(error, qdelta.Error)
    for words in ("memory_limit is", "context of 2048", "weights", "attention cache", "states"):
        assert words in text
    assert "what would fit: ctx=" in text and 'or kv="q8"' in text
    assert not (tmp_path / "cache").exists()
    # What it says would fit does.
    ctx = int(text.split("ctx=")[1].split(",")[0])
    assert qdelta.load("demo", quant="w8", ctx=ctx, memory_limit=limit).context == ctx
    assert qdelta.load("demo", quant="w8", ctx=2048, kv="q8", memory_limit=limit).context == 2048
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.needed, copy.limit) == (text, error.needed, error.limit)


def test_sessions_beyond_the_limit():
    plan = qdelta.plan("demo", ctx=1024)
    limit = plan.weights + plan.session + plan.state + plan.scratch
    model = qdelta.load("demo", ctx=1024, memory_limit=limit)
    first, second = model.session(), model.session()
    with pytest.raises(qdelta.MemoryLimitError, match="drop sessions and snapshots"):
        model.session()
    with pytest.raises(qdelta.MemoryLimitError):
        model.generate("Once upon a time", max_tokens=2)
    first.feed([5] * 600)
    second.feed([5] * 256)
    held = model.native.memory_held
    with pytest.raises(qdelta.MemoryLimitError) as caught:
        second.feed([5])
    assert caught.value.limit == limit < caught.value.needed
    assert (model.native.memory_held, second.n_tokens) == (held, 256)
    with pytest.raises(qdelta.MemoryLimitError):
        first.snapshot()
    del first
    second.feed([5] * 100)
    text = model.generate("Once upon a time", max_tokens=2, temperature=0).text
    assert (
        text == qdelta.load("demo").generate("Once upon a time", max_tokens=2, temperature=0).text
    )


def test_answers_do_not_depend_on_a_limit():
    """Chunks that snapshots share are copied before they are written, limit or not."""
    plan = qdelta.plan("demo", ctx=512)
    limit = plan.weights + 2 * plan.session + 2 * plan.state
    limited, free = qdelta.load("demo", ctx=512, memory_limit=limit), qdelta.load("demo", ctx=512)
    rows = []
    for model in (limited, free):
        session = model.session()
        session.feed(range(300))
        snapshot = session.snapshot()
        once = session.feed(range(20, 30))
        session.restore(snapshot)
        again = session.feed(range(20, 30))
        np.testing.assert_array_equal(once, again)
        rows.append(again)
    np.testing.assert_array_equal(*rows)


def test_many_rows_of_logits_count():
    plan = qdelta.plan("demo", ctx=512)
    model = qdelta.load("demo", ctx=512, memory_limit=plan.weights + plan.session + (1 << 20))
    session = model.session()
    with pytest.raises(qdelta.MemoryLimitError):
        session.feed([5] * 500, logits="all")  # 8 MB of them
    assert session.n_tokens == 0
    assert session.feed([5] * 10, logits="all").shape == (10, model.native.vocab_size)


# ------------------------------------------------------------------------------- command line


def run(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(cli, [*map(str, args)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_the_table_of_plans():
    args = ("plan", "--synthetic", "4B", "--ctx", "4096,32768", "--kv", "auto,q8")
    text = run(*args, "--quant", "w4,none", "--memory", "4 GB").stdout
    lines = [line for line in text.splitlines() if "│" in line]
    assert len(lines) == 8 and "Qwen3.5 4B, 1 session" in text
    for line in lines:
        quant, kv, ctx = (cell.strip() for cell in line.split("│")[1:4])
        plan = qdelta.plan(SIZES["4B"], quant=quant, kv=kv, ctx=int(ctx))
        fits = "yes" if plan.fits("4 GB") else "no"
        assert memory.size_text(plan.total) in line and line.split("│")[-2].strip() == fits


def test_plans_as_json():
    args = ("plan", "demo", "--quant", "auto,w8,w4", "--ctx", "100,4096", "--sessions", 2, "--json")
    report = json.loads(run(*args, "--memory", 10**7).stdout)
    assert report["memory"] == 10**7
    plans = report["plans"]
    # As many tokens as the model has are the most; "auto" is another name.
    assert {plan["ctx"] for plan in plans} == {100, 2048}
    assert {plan["quant"] for plan in plans} == {"none", "w8", "w4"}
    assert len(plans) == 3 * 2 * 2
    for plan in plans:
        same = qdelta.plan(
            "demo", quant=plan["quant"], kv=plan["kv_format"], ctx=plan["ctx"], sessions=2
        )
        assert plan["total"] == same.total and plan["fits"] == same.fits(10**7)


def test_inspect_plans_as_plan_does():
    report = json.loads(run("inspect", "demo", "--ctx", 300, "--kv", "q8", "--json").stdout)
    plan = qdelta.plan("demo", quant="none", ctx=300, kv="q8")
    assert [report["memory"][part] for part in PARTS] == parts(plan)
    assert report["memory"]["kv_type"] == "q8"


def test_a_limit_on_the_command_line(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 20)
    run("run", "demo", "ab", "-n", 2, "--memory-limit", "1 GB")
    run("eval", "demo", "--text", text, "--window", 16, "--memory-limit", "100 MiB")
    result = run("run", "demo", "ab", "--memory-limit", "1 MB", status=1)
    assert isinstance(result.exception, qdelta.MemoryLimitError)
    assert "what would fit: nothing" in str(result.exception)


def test_wrong_usage():
    for args, words in [
        ((), "give a MODEL or --synthetic"),
        (("demo", "--synthetic", "4B"), "one of them"),
        (("demo", "--ctx", "0"), "--ctx"),
        (("demo", "--ctx", "many"), "numbers separated by commas"),
        (("demo", "--quant", "w4,w5"), "'w5'"),
        (("demo", "--kv", "q4"), "'q4'"),
    ]:
        assert words in run("plan", *args, status=2).output
