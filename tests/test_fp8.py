"""FP8 checkpoints with scales of blocks: every number is the f32 product of code and scale.

So each computes what an F32 checkpoint of these products computes, to the bit, in its own format
and in every format that it is converted to.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import qdelta
from hostile import FULL, LAYER, NAME, PREFIX, edit_config, refuses
from qdelta import _native, weights
from qdelta.cli import cli
from reference import widen
from tiny import Container, Stored, make_checkpoint, only_file

ISAS = _native.instruction_sets()
SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.visual"],
}
BLOCK = 128
# Blocks end inside of matrices, both ways.
TEXT = {"hidden_size": 160, "intermediate_size": 272, "tie_word_embeddings": False}
RELEASED = ("mlp.", "self_attn.", "in_proj_qkv.", "in_proj_z.", "out_proj.")
SCALES = f"{NAME}_scale_inv"


def meaning(code: int) -> float:
    """What an e4m3 code means."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return np.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([meaning(code) for code in range(256)], np.float32)
NUMBERS = np.flatnonzero(~np.isnan(E4M3)).astype(np.uint8)


def random_fp8(shape, dtype: str, rng: np.random.Generator) -> tuple[Stored, Stored, np.ndarray]:
    """Codes, scales of a float type, and their products."""
    codes = rng.choice(NUMBERS, shape)
    grid = [-(-n // BLOCK) for n in shape]
    scales = Stored.of(dtype, rng.uniform(0.004, 0.012, grid) / np.sqrt(shape[1]))
    spread = widen(dtype, scales.data).reshape(grid).repeat(BLOCK, 0).repeat(BLOCK, 1)
    products = E4M3[codes] * spread[: shape[0], : shape[1]]
    return Stored("F8_E4M3", list(shape), codes.tobytes()), scales, products


def pair(tmp_path: Path, parts=RELEASED, dtype: str = "BF16", **options) -> tuple[Path, Path]:
    """An FP8 checkpoint, and one of the same numbers that has F32 in place of FP8."""
    folders = [tmp_path / name / "model" for name in ("fp8", "f32")]
    for folder in folders:
        make_checkpoint(folder, TEXT, **options)
    coded, plain = (Container.read(only_file(folder)) for folder in folders)
    rng = np.random.default_rng(0)
    for name, tensor in list(coded.tensors.items()):
        if len(tensor.shape) != 2 or not any(part in name for part in parts):
            continue
        codes, scales, products = random_fp8(tensor.shape, dtype, rng)
        coded.tensors |= {name: codes, f"{name}_scale_inv": scales}
        plain.tensors[name] = Stored.of("F32", products)
    for folder, container in zip(folders, (coded, plain), strict=True):
        container.write(only_file(folder))
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": SETTINGS}))
    return folders[0], folders[1]


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return pair(tmp_path)[0]


def logits(checkpoint: _native.Checkpoint, isa: str | None = None) -> np.ndarray:
    """Of a prompt and of decoded tokens."""
    session = _native.Model(checkpoint, isa=isa, threads=2).session()
    ids = np.random.default_rng(1).integers(0, 448, 50).astype(np.int32)
    rows = []
    for part in (ids[:47], *ids[47:].reshape(-1, 1)):
        session.feed(part, logits="all")
        rows.append(session.logits())
    return np.concatenate(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("parts", "dtype"), [(RELEASED, "BF16"), (RELEASED, "F32"), (("weight",), "F32")], ids=str
)
def test_rows_where_they_lie(tmp_path, parts, dtype, isa):
    """As released, and with every matrix as FP8, embedding, head and decay included."""
    coded, plain = (_native.Checkpoint(str(path)) for path in pair(tmp_path, parts, dtype))
    want = logits(plain, isa)
    assert np.isfinite(want).all()
    assert logits(coded, isa).tobytes() == want.tobytes()


@pytest.mark.parametrize("parts", [RELEASED, ("weight",)], ids=["released", "all"])
@pytest.mark.parametrize("quant", weights.RECIPES)
def test_conversions(tmp_path, quant, parts):
    """The module for multi-token prediction and the vision tower included."""
    found = []
    for path in pair(tmp_path, parts, mtp=True, vision=True):
        out = path.parent / "converted.safetensors"
        weights.convert(_native.Checkpoint(str(path)), path, out, quant=quant, progress=False)
        tensors = Container.read(out).tensors
        assert tensors.pop("file:config.json")
        found.append({name: t for name, t in tensors.items() if not name.startswith("padding.")})
    assert found[0] == found[1]


def test_scales_in_another_file(tmp_path):
    whole, plain = pair(tmp_path)
    container = Container.read(only_file(whole))
    scales = {n: t for n, t in container.tensors.items() if n.endswith("_scale_inv")}
    others = {n: t for n, t in container.tensors.items() if n not in scales}
    only_file(whole).unlink()
    weight_map = {}
    for shard, tensors in (("a.safetensors", others), ("b.safetensors", scales)):
        Container(tensors).write(whole / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index = whole / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoints = [_native.Checkpoint(str(path)) for path in (whole, plain)]
    assert logits(checkpoints[0]).tobytes() == logits(checkpoints[1]).tobytes()


def test_auto_is_the_default_recipe(fp8, monkeypatch):
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    assert weights.open_model(fp8, cache=False, progress=False).quant == weights.DEFAULT


def test_gguf_file(tmp_path):
    written = []
    for path in pair(tmp_path):
        out = path.parent / "model.gguf"
        weights.convert_to_gguf(_native.Checkpoint(str(path)), path, out, dtype="F32")
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_scales_are_no_unknown_tensors(tmp_path):
    folder, _ = pair(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.open_model(folder, "none")


def test_losses(tmp_path):
    coded, plain = (
        _native.losses(_native.Checkpoint(str(path)), ["w4", "w8"], {}) for path in pair(tmp_path)
    )
    assert coded == plain


def test_a_plan_counts_codes(tmp_path):
    """From the files, and from a config.json as the releases have it."""
    coded, plain = pair(tmp_path)
    saved = 0
    for tensor in Container.read(only_file(coded)).tensors.values():
        saved += 3 * np.prod(tensor.shape) if tensor.dtype == "F8_E4M3" else 0
    plans = [qdelta.plan(path, quant="none").weights for path in (coded, plain)]
    assert plans[1] - plans[0] == saved
    config = json.loads((coded / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert qdelta.plan(config, quant="none").weights == plans[0]
    for quant in ("balanced", "w8"):
        plans = [qdelta.plan(path, quant=quant).weights for path in (coded, plain)]
        assert plans[0] == plans[1] == qdelta.plan(config, quant=quant).weights


def test_inspect(fp8):
    result = CliRunner().invoke(cli, ["inspect", str(fp8), "--json"])
    types = json.loads(result.output)["types"]
    assert types["F8_E4M3"]["tensors"] == 4 * 3 + 3 * 3 + 4


# --------------------------------------------------------------------------------- damage


def damaged(folder: Path, **tensors: Stored | None) -> Path:
    """With other tensors; None removes one."""
    container = Container.read(only_file(folder))
    container.tensors |= tensors
    container.tensors = {n: t for n, t in container.tensors.items() if t is not None}
    container.write(only_file(folder))
    return folder


def scales_like(shape, value: float = 1.0, dtype: str = "F32") -> Stored:
    return Stored.of(dtype, np.full(shape, value, np.float32))


DAMAGE = {
    "no scales": ({SCALES: None}, NAME, "its scales are missing"),
    "one row too few": ({SCALES: scales_like((2, 2))}, SCALES, "[2, 2], expected [3, 2]"),
    "a vector": ({SCALES: scales_like((6,))}, SCALES, "[6], expected [3, 2]"),
    "one for all": ({SCALES: scales_like(())}, SCALES, "[], expected [3, 2]"),
    "of another type": ({SCALES: Stored("F8_E8M0", [3, 2], bytes(6))}, SCALES, "F8_E8M0"),
    "scales of their own": ({SCALES: Stored("F8_E4M3", [3, 2], bytes(6))}, SCALES, "F8_E4M3"),
    "twice": ({SCALES.replace(PREFIX, "model."): scales_like((3, 2))}, "and so is tensor"),
    "of floats": ({f"{PREFIX}embed_tokens.weight_scale_inv": scales_like((4, 2))}, "embed_tokens"),
    "of activations": ({f"{LAYER}mlp.up_proj.activation_scale": scales_like(())}, "activation"),
    "per tensor": ({f"{LAYER}mlp.up_proj.weight_scale": scales_like(())}, "weight_scale`"),
    "another FP8": ({NAME: Stored("F8_E5M2", [272, 160], bytes(272 * 160))}, NAME, "F8_E5M2"),
    "a norm": ({f"{FULL}self_attn.q_norm.weight": Stored("F8_E4M3", [16], bytes(16))}, "q_norm"),
    "a convolution": (
        {f"{LAYER}linear_attn.conv1d.weight": Stored("F8_E4M3", [128, 1, 4], bytes(512))},
        "conv1d",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_fit(fp8, case):
    tensors, *words = DAMAGE[case]
    refuses(damaged(fp8, **tensors), "model.safetensors", *words)


def test_without_settings(fp8):
    """Nothing says what the codes mean."""
    path = fp8 / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    refuses(fp8, "dtype F8_E4M3, expected BF16, F16 or F32")


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_scheme": "static"},
        {"fmt": "e5m2"},
        {"scale_fmt": "ue8m0"},
        {"weight_block_size": None},
        {"weight_block_size": [64, 128]},
    ],
    ids=str,
)
def test_settings_that_are_not_supported(fp8, changes):
    edit_config(fp8, quantization_config=SETTINGS | changes)
    (name,) = changes
    refuses(fp8, "config.json", name, "original BF16", kind=qdelta.UnsupportedError)


def nan_code() -> Stored:
    codes = bytearray(272 * 160)
    codes[7 * 160 + 3] = 0xFF
    return Stored("F8_E4M3", [272, 160], bytes(codes))


@pytest.mark.parametrize(
    ("tensors", "row"),
    [
        ({NAME: nan_code()}, "row 7 holds NaN"),
        ({SCALES: scales_like((3, 2), np.nan)}, "row 0 holds NaN"),
        ({SCALES: scales_like((3, 2), np.inf)}, "row 0 holds"),
        ({SCALES: scales_like((3, 2), 1e38)}, "row 0 holds"),
    ],
    ids=["a code", "a scale", "an infinite scale", "products"],
)
@pytest.mark.parametrize("quant", ["w4", "balanced"])
def test_what_is_not_finite_is_not_converted(fp8, tensors, row, quant):
    damaged(fp8, **tensors)
    with pytest.raises(qdelta.FileError, match=row) as caught:
        qdelta.load(fp8, quant=quant, cache=False, progress=False)
    assert NAME in str(caught.value)


def test_what_is_not_finite_is_not_kept(fp8):
    name = f"{LAYER}linear_attn.in_proj_a.weight"
    codes, scales = Stored("F8_E4M3", [4, 160], b"\x7f" * 640), scales_like((1, 2))
    damaged(fp8, **{name: codes, f"{name}_scale_inv": scales})
    with pytest.raises(qdelta.FileError, match="row 0 holds NaN") as caught:
        qdelta.load(fp8, quant="w8", cache=False, progress=False)
    assert name in str(caught.value)
