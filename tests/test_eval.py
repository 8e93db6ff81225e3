"""Comparisons of a model with a reference, and the command `qdelta eval`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import qdelta
from golden_data import DEMO
from qdelta import evaluate, plots, quality
from qdelta.cli import cli
from tiny import make_checkpoint

TEXT = (DEMO / "validation.txt").read_text(encoding="utf-8")[:12000]


@pytest.fixture(scope="module")
def reference() -> qdelta.Model:
    return qdelta.load("demo", quant="none")


@pytest.fixture(scope="module")
def model() -> qdelta.Model:
    return qdelta.load("demo", quant="w4")


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def bound(rows: np.ndarray) -> float:
    """What KL may be off by in float32: rounding of differences and exponentials of the logits,
    each of which a weight of at most 1 multiplies."""
    spread = float((rows.max(axis=-1) - rows.min(axis=-1)).max())
    return 8 * float(np.finfo(np.float32).eps) * (1 + spread)


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("window", [2, 7, 64])
def test_a_comparison_is_that_of_all_logits(model, reference, window):
    """Against the same from whole logits in float64."""
    ids = np.array(model.encode(TEXT)[:400])
    kl, losses, same = [], [], []
    most = 0.0
    for begin in range(0, len(ids) - window + 1, window):
        part = ids[begin : begin + window]
        rows, expected = model.logits(part)[:-1], reference.logits(part)[:-1]
        q, p = log_softmax(rows), log_softmax(expected)
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        losses.append([-x[np.arange(window - 1), part[1:]] for x in (q, p)])
        same.append(q.argmax(axis=1) == p.argmax(axis=1))
        most = max(most, bound(rows), bound(expected))
    kl, same = np.concatenate(kl), np.concatenate(same)
    found = model.compare(reference, ids.tolist(), window=window, worst=5)
    assert (found.windows, found.scored) == (len(ids) // window, kl.size)
    assert found.usage.prompt_tokens == found.windows * window
    assert found.mean_kl == pytest.approx(kl.mean(), abs=most)
    wanted = np.quantile(kl, [0.5, 0.99, 0.999, 1])
    got = [found.median_kl, found.p99_kl, found.p999_kl, found.max_kl]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=most)
    assert found.same_top == same.mean()
    for got, which in ((found.perplexity, 0), (found.reference, 1)):
        assert got.mean_loss == pytest.approx(np.mean([x[which] for x in losses]), abs=most)
    assert [token.kl for token in found.worst] == pytest.approx(np.sort(kl)[:-6:-1], abs=most)


def test_perplexities_are_those_of_each_model(model, reference):
    found = model.compare(reference, TEXT, window=128)
    for one, alone in ((found.perplexity, model), (found.reference, reference)):
        wanted = alone.perplexity(TEXT, window=128)
        assert one.perplexity == pytest.approx(wanted.perplexity, rel=1e-9)
        assert one.second_half == pytest.approx(wanted.second_half, rel=1e-9)
        assert (one.windows, one.scored) == (wanted.windows, wanted.scored)
    assert 0 < found.mean_kl < 0.1 and 0.8 < found.same_top < 1
    assert 0 < found.median_kl < found.p99_kl < found.p999_kl < found.max_kl
    assert found.timings.prefill_s > 0 and found.timings.tokenize_s > 0


def test_fewer_bits_cost_more(model, reference):
    eight = qdelta.load("demo", quant="w8").compare(reference, TEXT, window=128)
    assert eight.mean_kl < model.compare(reference, TEXT, window=128).mean_kl / 4


def test_a_model_is_its_own_equal(reference):
    found = reference.compare(reference, TEXT, window=64)
    assert (found.mean_kl, found.max_kl, found.same_top) == (0, 0, 1)
    assert found.perplexity.mean_loss == found.reference.mean_loss
    assert found.worst == []


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 30.0])
def test_divergence_of_rows(offset, spread):
    random = np.random.default_rng(7)
    expected = (random.standard_normal((20, 5000)) * 4 + offset).astype(np.float32)
    rows = (expected + random.standard_normal(expected.shape) * spread).astype(np.float32)
    q, p = log_softmax(rows), log_softmax(expected)
    most = max(bound(rows), bound(expected))
    for i in range(len(rows)):
        kl, losses = evaluate._divergence(rows[i], expected[i], np.int32(i))
        assert kl == pytest.approx((np.exp(p[i]) * (p[i] - q[i])).sum(), abs=most)
        assert kl > -most
        assert losses == pytest.approx((-q[i, i], -p[i, i]), abs=most)


def test_worst_tokens_tell_their_place(model, reference):
    ids = model.encode(TEXT)
    found = model.compare(reference, ids, window=100, worst=20)
    assert len(found.worst) == 20
    assert [t.kl for t in found.worst] == sorted((t.kl for t in found.worst), reverse=True)
    assert found.worst[0].kl == found.max_kl
    for token in found.worst:
        begin = token.position // 100 * 100
        assert begin < token.position < begin + 100, "the first token of a window is not scored"
        assert token.token == model.decode([ids[token.position]], skip_special=False)
        before = model.decode(ids[begin : token.position], skip_special=False)
        assert token.before and before.endswith(token.before)
        logits = model.logits(ids[begin : token.position])[-1]
        assert token.likeliest == model.decode([int(logits.argmax())], skip_special=False)
        logits = reference.logits(ids[begin : token.position])[-1]
        assert token.reference_likeliest == model.decode([int(logits.argmax())], skip_special=False)
    assert model.compare(reference, ids[:300], window=100, worst=0).worst == []


def test_few_logits_are_held(model, reference, monkeypatch):
    """Pieces of any length give the same but for rounding, and no more is held than one."""
    ids = model.encode(TEXT)[:600]
    whole = model.compare(reference, ids, window=200)
    row = 4 * model.native.vocab_size
    monkeypatch.setattr(evaluate, "_LOGITS_BYTES", 12 * row)
    before = model.native.memory_held
    held = []
    pieces = model.compare(
        reference, ids, window=200, progress=lambda *_: held.append(model.native.memory_held)
    )
    # The delta rule rounds by pieces, and activations of eight bits enlarge that.
    assert pieces.mean_kl == pytest.approx(whole.mean_kl, rel=0.01)
    assert pieces.scored == whole.scored
    plan = model.native.memory_plan(model.context)
    cache = model.native.memory_plan(200).kv
    few = before + plan.state + plan.scratch + cache
    # Three rows of logits, of which one is planned, with what the head reads.
    assert len(held) == 3 and few < max(held) < few + 3 * row


# ------------------------------------------------------------------------------------- errors


def test_what_cannot_be_compared(model, reference, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(qdelta.demo.path(), folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = stored["model"]["vocab"]
    vocab["Ġking"], vocab["Ġqueen"] = vocab["Ġqueen"], vocab["Ġking"]
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    other = qdelta.load(folder)
    id = min(vocab["Ġking"], vocab["Ġqueen"])
    with pytest.raises(qdelta.ArgumentError, match=rf"token {id} is '.*' and '.*'"):
        model.compare(other, TEXT)
    smaller = qdelta.load(make_checkpoint(tmp_path / "smaller"))
    with pytest.raises(qdelta.ArgumentError, match="tokens differ: 4096 and"):
        model.compare(smaller, TEXT)
    short = qdelta.load("demo", ctx=64)
    with pytest.raises(qdelta.ContextError, match="holds 64"):
        model.compare(short, TEXT)
    with pytest.raises(qdelta.ArgumentError, match="shorter than one window"):
        model.compare(reference, "short")
    for worst in (-1, True, 1.5):
        with pytest.raises(qdelta.ArgumentError, match="worst"):
            model.compare(reference, TEXT, worst=worst)
    with pytest.raises(qdelta.ArgumentError, match="window"):
        model.compare(reference, TEXT, window=1)


def test_other_rows_of_logits(tmp_path):
    """The same tokenizer on models with different padding."""
    folders = [
        make_checkpoint(tmp_path / str(size), text={"vocab_size": size}) for size in (512, 576)
    ]
    one, other = map(qdelta.load, folders)
    with pytest.raises(qdelta.ArgumentError, match="512 and 576 logits"):
        one.compare(other, list(range(100)), window=10)


# ------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["eval", *map(str, args)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_one_model(text_file, model, reference):
    args = ("demo", "--against", "demo", "--quant", "w4", "--text", text_file, "--window", 64)
    wanted = model.compare(reference, TEXT, window=64)
    text = run(*args).stdout
    for words in (
        f"against demo, none, perplexity {wanted.reference.perplexity:.4f}",
        f"{wanted.scored} tokens scored in windows of 64",
        f"{wanted.perplexity.perplexity:.4f} | {wanted.mean_kl:.5f}",
        f"{wanted.same_top:.2%}",
        "Where they differ most",
        repr(wanted.worst[0].before),
    ):
        assert words in text
    assert "Where" not in run(*args, "--worst", 0).stdout
    (row,) = json.loads(run(*args, "--json").stdout)
    assert row["quant"] == "w4" and row["against_quant"] == "none"
    assert math.isclose(row["mean_kl"], wanted.mean_kl, rel_tol=1e-6)
    assert row["worst"][0]["token"] == wanted.worst[0].token
    plan = qdelta.plan("demo", quant="w4")
    assert row["weight_bytes"] == plan.weights
    assert row["bits_per_weight"] == pytest.approx(8 * plan.weights / 4.15e6, rel=0.2)


def test_a_quantised_reference(text_file):
    args = ("demo", "--against", "demo", "--text", text_file, "--window", 64, "--json")
    (row,) = json.loads(run(*args, "--quant", "w8", "--against-quant", "w8").stdout)
    assert (row["quant"], row["against_quant"], row["mean_kl"]) == ("w8", "w8", 0)


def test_a_converted_reference_is_what_it_is(text_file, tmp_path):
    out = tmp_path / "demo.w4.safetensors"
    assert CliRunner().invoke(cli, ["convert", "demo", "-o", str(out)]).exit_code == 0
    args = (out, "--against", out, "--text", text_file, "--window", 64, "--json")
    (row,) = json.loads(run(*args).stdout)
    assert row["quant"] == row["against_quant"] and row["quant"] != "none" and row["mean_kl"] == 0


def test_several_models_and_a_plot(text_file, tmp_path):
    pytest.importorskip("matplotlib")
    image, saved = tmp_path / "kl.svg", tmp_path / "saved.json"
    args = ("demo", "demo", "--against", "demo", "--quant", "w8", "--text", text_file)
    done = run(*args, "--window", 64, "--plot", image)
    assert done.stdout.count("| demo ") == 2 and "Where" not in done.stdout
    assert "<svg" in image.read_text()
    rows = run(*args, "--window", 64, "--json").stdout
    assert len(json.loads(rows)) == 2
    saved.write_text(rows)
    first = image.read_bytes()
    run("--plot", image, "--from", saved)
    assert image.read_bytes() == first, "a plot of the same results"
    run("demo", *args[2:4], "--text", text_file, "--window", 64, "--plot", image, "--from", saved)
    assert image.read_bytes() != first


def test_plots_have_what_differs(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    rows = [row(mean_kl=0.02, p99_kl=0.2, bits_per_weight=4.5), row(model="same", mean_kl=0.0)]
    file = tmp_path / "kl.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plots.plot_quality(rows, file)
        text = file.read_text()
        assert "m, w4" in text and "same, w4" not in text.replace("no difference: same, w4", "")
        assert "no difference: same, w4" in text
        plots.plot_quality(rows[1:], file)
        assert "no difference" in file.read_text()


def row(**changes) -> quality.Quality:
    values = {
        "model": "m", "model_type": "0.8B", "quant": "w4", "weight_bytes": 1,
        "bits_per_weight": 5.0, "against": "r", "against_quant": "none", "window": 8, "scored": 9,
        "perplexity": 9.0, "reference_perplexity": 8.0, "mean_kl": 0.1, "median_kl": 0.1,
        "p99_kl": 0.1, "p999_kl": 0.1, "max_kl": 0.1, "same_top": 0.9, "tokens_per_s": 1.0,
        "worst": [],
    }  # fmt: skip
    return quality.Quality(**{**values, **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{}]", "entry 0: no `model`"),
        ("[1]", "expected an object"),
        ("nothing", "not the JSON of `qdelta eval"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_saved_results_that_are_none(tmp_path, content, words):
    path = tmp_path / "saved.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(qdelta.FileError, match=words):
        quality.read_qualities(path)


def test_wrong_usage(text_file, tmp_path):
    text = ("--text", text_file)
    for args, words in [
        ((), "give a MODEL"),
        (("demo",), "--text is missing"),
        (("demo", "demo", *text), "several MODELs are for --against"),
        (("demo", *text, "--plot", tmp_path / "x.svg"), "give --against"),
        (("demo", *text, "--against", "demo", "--plot", tmp_path / "x.pdf"), "--plot"),
        (("demo", *text, "--against-quant", "w4"), "--against-quant is for"),
        (("demo", *text, "--against", "demo", "--head", "screened"), "--head screened"),
        (("demo", *text, "--from", text_file), "--from is for --plot"),
    ]:
        assert words in run(*args, status=2).output
