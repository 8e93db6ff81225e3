"""Recipes: names, files, and calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qdelta
from golden_data import DEMO
from qdelta import _native, calibration, demo, recipes, weights
from qdelta.errors import ArgumentError, FileAccessError, FileError, UnsupportedError

VALIDATION = (DEMO / "validation.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source() -> _native.Checkpoint:
    return _native.Checkpoint(str(demo.path()))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.array(qdelta.load("demo").encode(VALIDATION)[:4096], np.int32)


def made(source, quant, formats=None, importance=None) -> _native.Checkpoint:
    """The demo model converted in memory."""
    converted = _native.convert(
        source, None, quant=quant, attachments=[], formats=formats, importance=importance
    )
    assert converted is not None
    return converted


def stored(checkpoint: _native.Checkpoint) -> dict[str, str]:
    """Format by name of the matrix."""
    types = {}
    for name, dtype, *_ in checkpoint.tensors():
        stem, _, end = name.rpartition(".")
        types[stem if end == dtype else name] = dtype
    return types


def read(tmp_path: Path, text: str) -> list[recipes.Rule]:
    path = tmp_path / "recipe.txt"
    path.write_text(text, encoding="utf-8")
    return recipes.read(path)


def mean_kl(source, checkpoint, tokens) -> float:
    """Mean KL divergence from the unquantised model, windows of 512."""
    sessions = [_native.Model(c, kv="f32").session() for c in (source, checkpoint)]
    total = []
    for start in range(0, len(tokens), 512):
        rows = []
        for session in sessions:
            session.reset()
            session.feed(tokens[start : start + 512], "all")
            x = session.logits().astype(np.float64)
            x -= x.max(axis=1, keepdims=True)
            rows.append(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))
        total.append((np.exp(rows[0]) * (rows[0] - rows[1])).sum(axis=1))
    return float(np.concatenate(total).mean())


def test_more_bytes_are_nearer_to_the_original(source, tokens):
    sizes, divergences = [], []
    for quant in ("small", "balanced", "best", "w8"):
        checkpoint = made(source, quant)
        assert checkpoint.quant == quant
        sizes.append(sum(size for _, _, _, size, _ in checkpoint.tensors()))
        divergences.append(mean_kl(source, checkpoint, tokens))
    assert sizes == sorted(sizes)
    assert divergences == sorted(divergences, reverse=True)
    # Twice what was measured on the whole text.
    assert divergences[0] < 0.064 and divergences[1] < 0.032 and divergences[2] < 0.005


def test_first_rule_that_matches(tmp_path, source):
    rules = read(
        tmp_path,
        "# a comment\n\nlayers.0.*  w8  # all of it\nembed_tokens w6_k\n*.mlp.down_proj w5_k\n"
        "*.self_attn.o_proj w6_k|w4\n*.in_proj_[ab] keep\n",
    )
    formats = recipes.formats(rules, source)
    assert formats["layers.0.mlp.down_proj.weight"] == "w8"
    assert formats["layers.1.mlp.down_proj.weight"] == "w5_k"
    # Rows of 128 columns.
    assert formats["layers.3.self_attn.o_proj.weight"] == "w4"
    types = stored(made(source, "custom", formats))
    assert types["layers.0.mlp.down_proj"] == "w8"
    assert types["layers.1.mlp.down_proj"] == "w5_k"
    assert types["layers.3.self_attn.o_proj"] == "w4"
    assert types["embed_tokens"] == "w6_k"
    assert types["layers.1.linear_attn.in_proj_a.weight"] == "BF16"
    # As in balanced.
    assert types["layers.1.mlp.up_proj"] == "w4_nl_r"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed_tokens", "recipe.txt:1: expected a pattern and a format"),
        ("\nembed_tokens w6_k w8", "recipe.txt:2: expected a pattern and a format"),
        ("embed_tokens q4_0", "recipe.txt:1: format 'q4_0', expected one of: keep, w4"),
        ("embed_tokens w8\nembed w8", "recipe.txt:2: 'embed' matches no matrix"),
        ("* w8\nembed_tokens w4", "recipe.txt:2: 'embed_tokens' matches no matrix"),
        ("*.o_proj w6_k", "recipe.txt:1: layers.3.self_attn.o_proj has rows of 128 columns"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, source, text, message):
    with pytest.raises(FileError) as error:
        recipes.formats(read(tmp_path, text), source)
    assert message in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileAccessError):
        recipes.read(tmp_path / "none.txt")
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="not UTF-8 at byte 0"):
        recipes.read(tmp_path / "a")


def test_names_that_the_core_refuses(source):
    for formats, importance in [
        ({"layers.0.mlp.up.weight": "w8"}, None),
        ({"norm.weight": "w8"}, None),
        ({"embed_tokens.weight": "q2_k"}, None),
        (None, {"embed_tokens.weight": np.ones(3, np.float32)}),
        (None, {"embed_tokens.weight": np.full(256, -1, np.float32)}),
        (None, {"embed_tokens.weight": np.full(256, np.nan, np.float32)}),
    ]:
        with pytest.raises(ArgumentError):
            made(source, "custom", formats, importance)
    with pytest.raises(UnsupportedError, match="rows of 128 columns cannot be w6_k"):
        made(source, "custom", {"layers.3.self_attn.o_proj.weight": "w6_k"})


def test_importance_is_the_mean_square_of_the_input(source, tokens):
    model = _native.Model(source)
    found = calibration.importance(source, model, tokens[:700])
    names = {name for name, _, _ in source.matrices() if not name.startswith("mtp.")}
    assert found.keys() == names
    # One window of 512 in one piece, and what is left of the second.
    squares = []
    for part in (tokens[:512], tokens[512:700]):
        values = model.session().trace(part)["layer.3.attn_gated"].astype(np.float64)
        squares.append(values**2)
    mean = np.concatenate(squares).mean(axis=0)
    expected = mean + 1e-3 * mean.mean()
    np.testing.assert_allclose(found["layers.3.self_attn.o_proj.weight"], expected, rtol=1e-4)
    with pytest.raises(ArgumentError, match="empty"):
        calibration.importance(source, model, tokens[:0])


def test_calibration_helps_on_text_that_it_did_not_see(source, tokens):
    importance = calibration.importance(source, _native.Model(source), tokens[:2048])
    unseen = tokens[2048:]
    plain = mean_kl(source, made(source, "balanced"), unseen)
    calibrated = mean_kl(source, made(source, "balanced", None, importance), unseen)
    assert calibrated < 0.97 * plain


def test_losses_fall_with_bits(source):
    losses = _native.losses(source, ["w4", "w4_nl", "w5_k", "w6_k", "w8"], {})
    by_matrix: dict[str, dict[str, tuple[int, float]]] = {}
    for name, format, size, loss in losses:
        by_matrix.setdefault(name, {})[format] = (size, loss)
    up = by_matrix["layers.0.mlp.up_proj.weight"]
    assert up["w4"][1] > up["w4_nl"][1] > up["w5_k"][1] > up["w6_k"][1] > up["w8"][1] > 0
    assert up["w4"][0] == 256 * 256 * 9 // 16
    assert set(by_matrix["layers.3.self_attn.o_proj.weight"]) == {"w4", "w4_nl", "w8"}


def test_losses_of_a_conversion(source, tokens, tmp_path):
    importance = calibration.importance(source, _native.Model(source), tokens[:600])
    chosen = {"layers.5.mlp.down_proj.weight": "w4", "layers.1.mlp.up_proj.weight": "w8"}
    converted = made(source, "custom", chosen, importance)
    found = calibration.losses(source, converted, importance)
    assert found[0][:2] == ("layers.5.mlp.down_proj", "w4")
    assert [loss for _, _, loss in found] == sorted((loss for _, _, loss in found), reverse=True)
    by_name = {name: (format, loss) for name, format, loss in found}
    # Of a matrix with 256 rows all are measured: the loss can be worked out from what is stored.
    format, loss = by_name["layers.1.mlp.up_proj"]
    assert format == "w8" and 0 < loss < 1e-4
    assert "embed_tokens" in by_name and not any(name.startswith("mtp.") for name in by_name)


def test_the_default_of_a_large_checkpoint(source, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    opened = weights.open_model(demo.path(), cache=tmp_path)
    assert opened.quant == "balanced"
    assert [path.suffixes[-2:] for path in tmp_path.glob("*.safetensors")] == [
        [".balanced", ".safetensors"]
    ]
    in_memory = weights.open_model(demo.path(), cache=False)
    assert in_memory.quant == "balanced" and in_memory.tensors()[0][:4] == opened.tensors()[0][:4]
