"""GGUF files as models: their numbers, in place and re-ordered, and what may be made of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import qdelta
from golden_data import DEMO, GOLDEN, TEXT, Tensors, golden_model, prompts
from qdelta import _native, recipes, weights
from qdelta.cli import cli
from tiny import Container

ISAS = _native.instruction_sets()
FILES = GOLDEN / "gguf"
FLOATS = FILES / "tiny-f32-F32.gguf"
FORMATS = set(recipes.FORMATS) - {"keep"}
QUANTISED = ("Q8_0", "Q4_K_M")
LOGITS = 1e-3  # absolute, of floats; two float32 orders of evaluation differ by up to 2e-4
# Of quantised files, against the numbers of the file in float32: what rounding the activations to
# bytes does to llama.cpp's logits, mean and largest, as tests/golden/README.md states. Logits have
# the standard deviation 3.
ROUNDED = {"Q8_0": (0.04, 0.21), "Q4_K_M": (0.06, 0.34)}

every_isa = pytest.mark.parametrize("isa", ISAS)
every_type = pytest.mark.parametrize("type", QUANTISED)


def quantised(type: str) -> Path:
    return FILES / f"tiny-k256-bf16-{type}.gguf"


@functools.cache
def stored(type: str) -> Tensors:
    return Tensors.load(FILES / f"tiny-k256-bf16-{type}-llamacpp.safetensors")


@functools.lru_cache(maxsize=8)
def load(path: Path, quant: str, isa: str | None = None, cache: bool | None = None):
    return qdelta.load(path, quant=quant, kv="f32", isa=isa, threads=2, cache=cache, progress=False)


# ---------------------------------------------------------------------------------- numbers


@every_isa
def test_floats(isa):
    """The model of the folder that the file was made from, greedy tokens included."""
    model = load(FLOATS, "none", isa)
    for prompt, case in prompts(golden_model("tiny-f32")):
        logits = model.logits(case["input_ids"].tolist())
        rows = case.get("rows", np.arange(len(logits)))
        assert np.abs(logits[rows] - case["logits"]).max() < LOGITS, prompt
        session = model.session()
        row = session.feed(case["input_ids"].tolist())
        for i, token in enumerate(case["greedy_ids"].tolist()):
            assert int(np.argmax(row)) == token, (prompt, i)
            row = session.feed([token])


@every_isa
@every_type
def test_quantised_logits(type, isa):
    mean, most = ROUNDED[type]
    for prompt in ("p1", "p3", "p65"):
        case = stored(type).under(prompt)
        want = case["dequant_f32_logits"]
        got = load(quantised(type), "none", isa).logits(case["input_ids"].tolist())
        error = np.abs(got - want)
        assert error.mean() < mean and error.max() < most, (prompt, error.mean(), error.max())


@every_type
def test_greedy_tokens_of_llama_cpp(type):
    """Wherever its choice is no matter of how activations are rounded, by it and here."""
    _, most = ROUNDED[type]
    model, clear, same = load(quantised(type), "gguf"), 0, 0
    for prompt in ("p1", "p3", "p65"):
        case = stored(type).under(prompt)
        session = model.session()
        row = session.feed(case["input_ids"].tolist())
        for token, margin in zip(
            case["llamacpp_greedy_ids"].tolist(), case["llamacpp_greedy_margin"], strict=True
        ):
            found = int(np.argmax(row))
            same += found == token
            # Each of the two logits may be off by `most`, here and there.
            if margin > 4 * most:
                clear += 1
                assert found == token, prompt
            row = session.feed([token])
    assert clear > 10 and same > 0.8 * 3 * 32


@every_type
def test_all_that_is_stored_is_compared(type):
    """By the two tests above, which need not have run."""
    stored.cache_clear()
    test_quantised_logits(type, ISAS[0])
    test_greedy_tokens_of_llama_cpp(type)
    stored(type).assert_all_used()


@every_isa
@every_type
def test_a_copy_has_the_bits_of_the_file(type, isa, tmp_path):
    """Rows where they lie, panels in memory, panels in a file: prefill and decode."""
    path, case = quantised(type), stored(type).under("p65")
    tokens = case["input_ids"].tolist()
    in_file = qdelta.load(path, quant="gguf", kv="f32", isa=isa, cache=tmp_path)
    again = qdelta.load(path, quant="gguf", kv="f32", isa=isa, cache=tmp_path, threads=1)
    models = [load(path, "none", isa), load(path, "gguf", isa, cache=False), in_file, again]
    assert [m.native.quant for m in models] == ["none", "gguf", "gguf", "gguf"]
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".safetensors", ".lock"]
    want = None
    for model in models:
        session = model.session()
        rows = [model.logits(tokens), session.feed(tokens)]
        rows += [session.feed([token]) for token in case["llamacpp_greedy_ids"].tolist()[:8]]
        got = np.concatenate([np.atleast_2d(row) for row in rows])
        want = got if want is None else want
        np.testing.assert_array_equal(got, want)


def test_screened_heads(tmp_path):
    """The head of a Q8_0 file is in two planes, as that of other models; it misses nothing here."""
    model = qdelta.load(quantised("Q8_0"), quant="gguf", head="screened", cache=tmp_path)
    assert model.native.head == "screened"
    full = load(quantised("Q8_0"), "gguf")
    ids = stored("Q8_0").under("p65")["input_ids"].tolist()
    for n in (1, 20, 65):
        sessions = [m.session() for m in (model, full)]
        assert len({int(np.argmax(s.feed(ids[:n]))) for s in sessions}) == 1


# ------------------------------------------------------------------------------ conversions


def perplexity(path: str | Path, quant: str) -> float:
    text = (DEMO / "validation.txt").read_text(encoding="utf-8")[:8000]
    return load(path, quant).perplexity(text).perplexity


@pytest.mark.parametrize("type", ["BF16", "F32"])
def test_floats_convert_as_the_folder_does(type, tmp_path, demo_folder):
    """To the same bytes, but for value heads, which are in another order.

    So is the order of some sums, and a difference of one bit may turn an activation's code by one:
    what codes add to a logit is as random as before, and not the same.
    """
    path = tmp_path / "demo.gguf"
    weights.convert_to_gguf(_native.Checkpoint(str(demo_folder)), demo_folder, path, dtype=type)
    assert abs(perplexity(path, "none") / perplexity(demo_folder, "none") - 1) < 1e-5
    for quant in ("w4", "w8", "balanced"):
        files = [tmp_path / f"{quant}-{source.name}.safetensors" for source in (path, demo_folder)]
        for source, out in zip((path, demo_folder), files, strict=True):
            weights.convert(_native.Checkpoint(str(source)), source, out, quant=quant)
        first, second = (Container.read(file).tensors for file in files)
        matrices = [name for name in first if Path(name).suffix[1:] in FORMATS]
        assert len(matrices) > 30
        for name in matrices:
            moved = "linear_attn" in name
            assert moved or first[name] == second[name], (quant, name)
        first, second = (perplexity(file, "auto") for file in files)
        assert abs(first / second - 1) < 2e-3, (quant, first, second)


@pytest.mark.parametrize("quant", ["w4", "w8", "small", "balanced", "best"])
@every_type
def test_quantised_files_are_not_rounded_again(type, quant, tmp_path):
    with pytest.raises(qdelta.UnsupportedError) as caught:
        qdelta.load(quantised(type), quant=quant, cache=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"tiny-k256-bf16-{type}.gguf: ")
    for words in ("quantised already (Q", f"converting it to {quant}", 'quant "auto"'):
        assert words in message
    assert not list(tmp_path.glob("*.safetensors"))


def test_auto(tmp_path, monkeypatch):
    """Toys stay as they are; of others quantised files are re-ordered, and floats converted."""
    assert weights.open_model(quantised("Q8_0"), "auto", tmp_path).quant == "none"
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    assert weights.open_model(quantised("Q8_0"), "auto", tmp_path).quant == "gguf"
    assert weights.open_model(FLOATS, "auto", tmp_path).quant == "balanced"


def test_gguf_is_for_gguf_files(folder, tmp_path):
    with pytest.raises(
        qdelta.ArgumentError, match=r"`gguf`, which is for GGUF files; .*checkpoint is none"
    ):
        weights.open_model(folder, "gguf", tmp_path)


@pytest.mark.parametrize("what", ["time", "content"])
def test_a_copy_is_made_again_when_the_file_changes(what, tmp_path):
    path, cache = tmp_path / "model.gguf", tmp_path / "cache"
    shutil.copyfile(quantised("Q8_0"), path)
    ids = [1, 2, 3]
    first = qdelta.load(path, quant="gguf", cache=cache).logits(ids)
    (copy,) = cache.glob("*.safetensors")
    before = copy.stat()

    def made_again() -> bool:
        now = copy.stat()
        return (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)

    assert np.array_equal(qdelta.load(path, quant="gguf", cache=cache).logits(ids), first)
    assert not made_again()
    status = path.stat()
    if what == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    else:
        shutil.copyfile(quantised("Q4_K_M"), path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = qdelta.load(path, quant="gguf", cache=cache).logits(ids)
    assert made_again() and np.array_equal(changed, first) == (what == "time")


def test_a_copy_carries_the_tokenizer(tmp_path):
    """It is a whole model: the GGUF file is not needed any more."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(quantised("Q8_0"), path)
    out = tmp_path / "copy.safetensors"
    weights.convert(_native.Checkpoint(str(path)), path, out, quant="gguf")
    want = load(quantised("Q8_0"), "none")
    path.unlink()
    got = qdelta.load(out, kv="f32")
    text = "A cow <|im_end|> e\u0301 12"
    assert got.encode(text) == want.encode(text)
    assert got.stop_ids == want.stop_ids
    messages = [{"role": "user", "content": "Hello"}]
    assert got.render(messages) == want.render(messages)
    assert np.array_equal(got.logits([1, 2, 3]), want.logits([1, 2, 3]))
    assert _native.Checkpoint(str(out)).convention == "gguf"
    _native.verify(str(out))


# ---------------------------------------------------------------------------- command line


def run(*args: object, status: int = 0) -> str:
    """What a command prints, its error included."""
    from click.testing import CliRunner

    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    # An error of ours is printed by who called this.
    return str(result.exception) if isinstance(result.exception, qdelta.Error) else result.output


def test_inspect():
    report = json.loads(run("inspect", quantised("Q4_K_M"), "--json"))
    assert report["quant"] == "none"
    assert set(report["types"]) == {"F32", "Q4_K", "Q6_K"}
    assert report["config"]["hidden_size"] == 256
    assert {tensor["name"] for tensor in report["tensors"]} >= {"token_embd.weight", "blk.0.ssm_a"}
    text = run("inspect", quantised("Q4_K_M"), "--tensors")
    assert "Q6_K" in text and "token_embd.weight" in text


def test_convert(tmp_path):
    out = tmp_path / "out.safetensors"
    run("convert", quantised("Q8_0"), "-o", out)
    report = json.loads(run("inspect", out, "--verify", "--json"))
    assert report["quant"] == "gguf" and report["verified"]
    got = qdelta.load(out, kv="f32").logits([1, 2, 3])
    assert np.array_equal(got, load(quantised("Q8_0"), "none").logits([1, 2, 3]))
    assert "quantised already" in run(
        "convert", quantised("Q8_0"), "--quant", "w4", "-o", tmp_path / "no.safetensors", status=1
    )
    assert not (tmp_path / "no.safetensors").exists()


def test_run_and_eval(tmp_path):
    greedy = ("--temperature", 0, "--raw", "-n", 16)
    for path in (FLOATS, TEXT / "tiny-f32"):
        text = run("run", path, *greedy, "Once upon a time")
        assert text.strip()
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "validation.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    found = {}
    for path in (FLOATS, TEXT / "tiny-f32"):
        report = json.loads(run("eval", path, "--text", text, "--window", 64, "--json"))
        found[path] = report["perplexity"]
    first, second = found.values()
    assert abs(first / second - 1) < 1e-4
    reports = [
        json.loads(
            run("eval", quantised("Q8_0"), "--text", text, "--window", 64, "--json",
                "--quant", quant, "--cache", tmp_path / "cache")
        )
        for quant in ("none", "gguf")
    ]  # fmt: skip
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert [report["quant"] for report in reports] == ["none", "gguf"]


def test_bench(tmp_path):
    rows = json.loads(
        run("bench", quantised("Q8_0"), "--quant", "gguf", "--cache", tmp_path,
            "-p", 8, "-n", 2, "-r", 1, "-o", "json")
    )  # fmt: skip
    assert len(rows) == 2


@pytest.mark.parametrize("type", ["BF16", "Q8_0", "Q4_0", "q8_0", None])
def test_convert_to_gguf(type, tmp_path, demo_folder):
    out = tmp_path / "out.gguf"
    options = () if type is None else ("--type", type)
    run("convert", "demo", "--to", "gguf", *options, "-o", out)
    model = qdelta.load(out, kv="f32")
    types = {dtype for _, dtype, *_ in _native.Checkpoint(str(out)).tensors()}
    assert types >= {"F32", (type or "Q8_0").upper()}
    want = load(demo_folder, "none")
    text = "Once upon a time, there was a little"
    if type == "BF16":
        (got, _), (expected, _) = (
            (m.generate(text, max_tokens=24, temperature=0).text, m) for m in (model, want)
        )
        assert got == expected
    messages = [{"role": "user", "content": "What does a cow eat?"}]
    assert model.render(messages) == want.render(messages)
    assert model.stop_ids == want.stop_ids
    assert "exists, expected a free name" in run(
        "convert", "demo", "--to", "gguf", "-o", out, status=1
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "gguf", "--quant", "w4"), "not for --to gguf"),
        (("--type", "Q8_0"), "--type is for --to gguf"),
        (("--to", "gguf", "--type", "Q4_K_M"), "'Q4_K_M' is not one of"),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path):
    out = tmp_path / "out"
    assert words in run("convert", "demo", *options, "-o", out, status=2)
    assert not list(tmp_path.iterdir())


def test_quantised_files_are_not_written_again(tmp_path):
    for path in (quantised("Q8_0"), quantised("Q4_K_M")):
        text = run("convert", path, "--to", "gguf", "-o", tmp_path / "out.gguf", status=1)
        assert "quantised already" in text and path.name in text
    assert not list(tmp_path.iterdir())
