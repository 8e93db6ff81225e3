"""Contradictory checkpoints: tensors, shards and configs that do not fit each other or the model.

Each is refused with an exception that names the file, the tensor or field, what was expected
and what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from click.testing import CliRunner

import qdelta
from hostile import FULL, INDEX, LAYER, NAME, PREFIX, edit_config, open_model, refuses
from qdelta import _native, weights
from qdelta.cli import cli
from tiny import VISION_PREFIXES, Container, Stored, make_checkpoint, only_file


def test_untouched_checkpoints_open(folder, sharded):
    open_model(folder)
    open_model(sharded)


# ---------------------------------------------------------------------- length of messages

LONG = "\x1b[2J\u202e" + "n" * 100_000


@pytest.mark.parametrize("where", ["dtype", "shard", "index", "unlisted", "hole", "value", "type"])
def test_messages_are_short_and_plain(folder, sharded, where):
    """Whatever a file calls its tensors and values."""
    if where in ("value", "type"):
        edit_config(folder, **{"hidden_act" if where == "value" else "model_type": LONG})
    elif where in ("shard", "index", "unlisted"):
        folder, index = sharded, json.loads((sharded / INDEX).read_text())
        names = {
            "shard": {NAME: LONG},
            "index": {LONG: "../x"},
            "unlisted": {LONG: index["weight_map"][NAME]},
        }
        index["weight_map"] |= names[where]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        path = only_file(folder)
        container = Container.read(path)
        header = container.header()
        if where == "dtype":
            header[NAME]["dtype"] = LONG
        else:
            header[LONG] = header[NAME]
        container.write(path, header)
    message = refuses(folder)
    assert len(message) < 1500 and message.isprintable(), message[:2000]


# ------------------------------------------------------------------- tensors of the model

WRONG = {
    "q_proj without gate": (f"{FULL}self_attn.q_proj.weight", (64, 32), "[128, 32]"),
    "q_norm": (f"{FULL}self_attn.q_norm.weight", (32,), "[16]"),
    "k_proj": (f"{FULL}self_attn.k_proj.weight", (64, 32), "[32, 32]"),
    "o_proj transposed": (f"{FULL}self_attn.o_proj.weight", (64, 32), "[32, 64]"),
    "embedding": (f"{PREFIX}embed_tokens.weight", (511, 32), "[512, 32]"),
    "flat": (f"{LAYER}mlp.up_proj.weight", (48 * 32,), "[48, 32]"),
    "in_proj_qkv": (f"{LAYER}linear_attn.in_proj_qkv.weight", (96, 32), "[128, 32]"),
    "A_log": (f"{LAYER}linear_attn.A_log", (4, 1), "[4]"),
    "dt_bias": (f"{LAYER}linear_attn.dt_bias", (2,), "[4]"),
    "gated norm": (f"{LAYER}linear_attn.norm.weight", (64,), "[16]"),
    "final norm": (f"{PREFIX}norm.weight", (31,), "[32]"),
    "conv of two dims": (f"{LAYER}linear_attn.conv1d.weight", (128, 4), "[128, 1, 4]"),
    "conv kernel": (f"{LAYER}linear_attn.conv1d.weight", (128, 1, 3), "[128, 1, 4]"),
    "nothing": (f"{LAYER}mlp.down_proj.weight", (0, 48), "[32, 48]"),
    "scalar": (f"{PREFIX}norm.weight", (), "[32]"),
    "MTP": ("mtp.fc.weight", (32, 32), "[32, 64]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_shape(folder, case):
    """The message has the file, its name for the tensor, both shapes."""
    name, shape, expected = WRONG[case]
    path = only_file(folder)
    container = Container.read(path)
    container.tensors[name] = Stored.of("BF16", np.ones(shape))
    container.write(path)
    found = str(list(shape)) if shape else "[]"
    refuses(folder, path.name, name, expected, found, kind=qdelta.FileError)


@pytest.mark.parametrize("dtype", ["F64", "I32", "I64", "U8", "I8", "BOOL", "F8_E4M3"])
def test_dtype(folder, dtype):
    """Numbers of another kind under a name of the model."""
    size = {"F64": 8, "I64": 8, "I32": 4}.get(dtype, 1)
    path = only_file(folder)
    container = Container.read(path)
    container.tensors[NAME] = Stored(dtype, [48, 32], bytes(48 * 32 * size))
    container.write(path)
    refuses(folder, path.name, NAME, dtype)


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}embed_tokens.weight",
        f"{PREFIX}norm.weight",
        f"{LAYER}input_layernorm.weight",
        f"{LAYER}linear_attn.A_log",
        f"{LAYER}linear_attn.conv1d.weight",
        f"{FULL}self_attn.q_norm.weight",
        f"{FULL}mlp.down_proj.weight",
    ],
)
def test_missing_tensor(folder, name):
    path = only_file(folder)
    container = Container.read(path)
    del container.tensors[name]
    container.write(path)
    refuses(folder, name.removeprefix(PREFIX), kind=qdelta.FileError)


def test_untied_without_head(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    refuses(folder, "lm_head.weight", kind=qdelta.FileError)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}input_layernorm.weight",
        f"{FULL}self_attn.k_norm.weight",
        f"{LAYER}linear_attn.A_log",
        f"{LAYER}linear_attn.dt_bias",
        f"{LAYER}linear_attn.norm.weight",
        f"{LAYER}linear_attn.conv1d.weight",
        f"{PREFIX}norm.weight",
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(folder, name, value):
    """In the small tensors every token meets, one NaN makes all logits NaN."""
    path = only_file(folder)
    container = Container.read(path)
    values = np.zeros(container.tensors[name].shape)
    values.flat[-1] = value
    container.tensors[name] = Stored.of("BF16", values)
    container.write(path)
    refuses(folder, path.name, name, kind=qdelta.FileError)


def test_not_finite_in_a_matrix_is_refused_by_conversion(folder, tmp_path):
    path = only_file(folder)
    container = Container.read(path)
    values = np.ones((48, 32))
    values[7, 5] = np.nan
    container.tensors[NAME] = Stored.of("BF16", values)
    container.write(path)
    for quant in ("w8", "w4"):
        out = tmp_path / f"{quant}.safetensors"
        with pytest.raises(qdelta.FileError, match=r"up_proj"):
            _native.convert(_native.Checkpoint(str(folder)), str(out), quant=quant, attachments=[])
        assert not out.exists()
        assert not list(tmp_path.glob("*.safetensors*"))


def test_tensors_nobody_knows_are_no_harm(folder):
    path = only_file(folder)
    container = Container.read(path)
    container.tensors["model.rotary_emb.inv_freq"] = Stored.of("F32", np.ones(4))
    container.write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.open_model(folder)
    container.tensors["extra"] = Stored("I64", [1], bytes(8))
    for i in range(4, 9):
        container.tensors[f"{PREFIX}layers.{i}.norm.weight"] = Stored.of("F32", np.ones(4))
    container.write(path)
    open_model(folder)
    text = rf"^{folder}: tensors .* are not used: .*layers.4.norm.weight', .* and 3 more$"
    with pytest.warns(UserWarning, match=text.replace("'", ".")):
        weights.open_model(folder)
    command = ["convert", str(folder), "-o", str(folder.parent / "out.safetensors")]
    command = [sys.executable, "-m", "qdelta", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"qdelta: warning: {folder}: tensors that Qwen3.5 does not have")
    assert done.stderr.count("\n") == 2, done.stderr
    out = folder.parent / "exported"
    with pytest.warns(UserWarning, match=text.replace("'", ".")):
        qdelta.export(folder, out)
    for command in (["inspect"], ["plan", "--ctx", "64"]):
        command += [str(folder)]
        told = [line for line in invoke(*command).splitlines() if "are not used" in line]
        assert len(told) == 1 and told[0].endswith(" and 3 more"), told
        names = json.loads(invoke(*command, "--json"))["unknown_tensors"]
        assert len(names) == 6 and "extra" in names


def invoke(*command: str) -> str:
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0 and not result.stderr, result.output
    return result.stdout


@pytest.mark.parametrize("name", ["tied", "plain", "MTP unused", "vision unused"])
def test_usual_tensors_give_no_warning(tmp_path, name):
    text = {"tie_word_embeddings": name != "plain"}
    folder = make_checkpoint(tmp_path / "m", text)
    path = only_file(folder)
    container = Container.read(path)
    if name == "tied":
        container.tensors["lm_head.weight"] = container.tensors[f"{PREFIX}embed_tokens.weight"]
    container.write(path)
    if name == "MTP unused":
        edit_config(folder, mtp_num_hidden_layers=0)
    if name == "vision unused":
        config = json.loads((folder / "config.json").read_text())
        config.pop("vision_config", None)
        (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.open_model(folder)
    for command in ("inspect", "plan"):
        assert "are not used" not in invoke(command, str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "x" * 2**20},
        {"hidden_act": "\x1b[2J\n\r\u202egelu" * 40},
        {"hidden_size": [1] * 2**20},
        {"dtype": "\n" * 2**20},
        {"quantization_config": {"quant_method": "fp8", "fmt": "\x07" * 2**20}},
    ],
    ids=lambda changes: f"{next(iter(changes))} {str(changes)[-10:]!r}",
)
def test_refusals_of_values_are_short(folder, changes):
    """And on one line, with nothing that would steer a terminal."""
    edit_config(folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    calls = [lambda: qdelta.plan(config)]
    if "dtype" not in changes:  # of config.json alone
        calls += [lambda: qdelta.load(folder), lambda: qdelta.plan(folder)]
    for call in calls:
        with pytest.raises(qdelta.Error) as caught:
            call()
        assert "config.json: " in str(caught.value)
        assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_inspect_shows_what_files_say_in_short(folder):
    edit_config(folder, note="\x1b[2J" * 2**18)
    path = only_file(folder)
    container = Container.read(path)
    container.tensors["\x1b[2J\n" * 2**16] = Stored("I64", [1], bytes(8))
    container.write(path)
    shown = invoke("inspect", str(folder), "--tensors")
    assert "\\x1b[2J" in shown and "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 1500


# ------------------------------------------------------------------------ MLX, MTP, vision


def test_mlx_by_its_convolution(folder):
    """Norms hold 1 + w and the convolution is transposed: other numbers, same names."""
    path = only_file(folder)
    container = Container.read(path)
    for t in container.tensors.values():
        if len(t.shape) == 3:
            t.shape = [t.shape[0], t.shape[2], t.shape[1]]
    container.write(path)
    refuses(folder, path.name, "conv1d", "MLX")


def test_mlx_by_its_metadata(folder):
    path = only_file(folder)
    container = Container.read(path)
    container.metadata = {"format": "mlx"}
    container.write(path)
    refuses(folder, path.name, "MLX")


def test_partial_mtp(folder):
    """All of the MTP block or none of it."""
    path = only_file(folder)
    container = Container.read(path)
    missing = "mtp.layers.0.self_attn.k_norm.weight"
    del container.tensors[missing]
    container.write(path)
    refuses(folder, missing, kind=qdelta.FileError)
    for name in [name for name in container.tensors if name.startswith("mtp.")]:
        del container.tensors[name]
    container.write(path)
    open_model(folder)


def test_vision_shapes_are_checked(tmp_path):
    folder = make_checkpoint(tmp_path, vision=True, tokenizer=False)
    open_model(folder)
    path = only_file(folder)
    name = f"{VISION_PREFIXES[0]}blocks.0.attn.qkv.bias"
    container = Container.read(path)
    container.tensors[name] = Stored.of("BF16", np.ones(16))
    container.write(path)
    refuses(folder, path.name, name, "[48]", "[16]", kind=qdelta.FileError)


# ------------------------------------------------------------------------- folder and index


def test_missing_shard(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refuses(sharded, gone.name, kind=qdelta.Error)


def test_tensor_not_in_its_shard(sharded):
    path = min(sharded.glob("*.safetensors"))
    container = Container.read(path)
    name = next(iter(container.tensors))
    del container.tensors[name]
    container.write(path)
    refuses(sharded, path.name, name, kind=qdelta.FileError)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "config.json"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "."}}',
        '{"weight_map": {"a": "x\\u0000y"}}',
    ],
)
def test_index(sharded, index):
    (sharded / INDEX).write_text(index)
    message = refuses(sharded, kind=qdelta.FileError)
    assert INDEX in message or "config.json" in message


def test_two_files_and_no_index(sharded):
    (sharded / INDEX).unlink()
    refuses(sharded, ".safetensors", kind=qdelta.FileError)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(qdelta.Error) as caught:
        _native.Checkpoint(str(tmp_path / "nothing here"))
    assert "nothing here" in str(caught.value)
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "config.json", kind=qdelta.Error)
    (tmp_path / "empty" / "config.json").mkdir()
    refuses(tmp_path / "empty", "config.json", kind=qdelta.Error)
    (tmp_path / "a.bin").write_bytes(b"hello")
    refuses(tmp_path / "a.bin", "a.bin", kind=qdelta.Error)


def test_no_weights(folder):
    only_file(folder).unlink()
    refuses(folder, ".safetensors", kind=qdelta.Error)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_pipes_and_links(folder):
    """A pipe would make a reader wait for ever; a link to the file is as good as the file."""
    path = only_file(folder)
    real = path.rename(folder.parent / "real.bin")
    path.symlink_to(real)
    open_model(folder)
    path.unlink()
    os.mkfifo(path)
    refuses(folder, path.name, kind=qdelta.Error)
    path.unlink()
    path.symlink_to(path.name)
    refuses(folder, path.name, kind=qdelta.Error)


# ---------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"text_config": 3}'])
def test_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json", kind=qdelta.FileError)


BAD_CONFIG = [
    {"hidden_size": None},
    {"hidden_size": 0},
    {"hidden_size": -32},
    {"hidden_size": 32.5},
    {"hidden_size": "32"},
    {"hidden_size": 64},
    {"hidden_size": 2**60},
    {"hidden_size": 2**70},
    {"vocab_size": 2**40},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 5},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 2**20},
    {"intermediate_size": 2**63},
    {"num_attention_heads": 3},
    {"num_attention_heads": 2**33, "head_dim": 2**33},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 0},
    {"head_dim": 0},
    {"head_dim": 15},
    {"linear_num_value_heads": 3},
    {"linear_num_key_heads": 0},
    {"linear_key_head_dim": 0},
    {"linear_value_head_dim": 2**62},
    {"linear_conv_kernel_dim": 0},
    {"linear_conv_kernel_dim": 2**50},
    {"rms_norm_eps": -1e-6},
    {"rms_norm_eps": "small"},
    {"full_attention_interval": 0},
    {"layer_types": ["linear_attention"] * 3},
    {"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]},
    {"layer_types": "linear_attention"},
    {"rope__partial_rotary_factor": 0},
    {"rope__partial_rotary_factor": 1.5},
    {"rope__partial_rotary_factor": -0.5},
    {"rope__rope_theta": 0},
    {"rope__rope_theta": -1},
    {"rope__rope_theta": "many"},
    {"rope__mrope_section": [2, 1]},
    {"rope__mrope_section": [-2, 1, 1]},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": -5},
]


@pytest.mark.parametrize("changes", BAD_CONFIG, ids=str)
def test_config_field(folder, changes):
    """A field that is missing, absurd, or at odds with the tensors."""
    edit_config(folder, **changes)
    message = refuses(folder)
    assert "config.json" in message or "tensor `" in message
    if list(changes) in (["hidden_size"], ["num_key_value_heads"], ["rms_norm_eps"]):
        assert "tensor `" in message or next(iter(changes)) in message


UNSUPPORTED = [
    ({"hidden_act": "gelu"}, "hidden_act", "gelu", "silu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attn_output_gate": False}, "attn_output_gate"),
    ({"rope__rope_type": "dynamic"}, "rope_type", "dynamic"),
    ({"rope__rope_type": "llama3"}, "rope_type", "llama3"),
    ({"model_type": "llama"}, "model_type", "llama"),
    ({"model_type": "qwen3_5_moe_text"}, "model_type"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    ({"num_experts": 128}, "num_experts"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quant"),
    ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers"),
    ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
]


@pytest.mark.parametrize("case", UNSUPPORTED, ids=lambda case: str(case[0]))
def test_config_of_another_model(folder, case):
    """Valid, but not what this engine computes."""
    changes, *words = case
    edit_config(folder, **changes)
    refuses(folder, "config.json", *words, kind=qdelta.UnsupportedError)


def test_load_says_the_same(tmp_path):
    """The public verb adds nothing and hides nothing."""
    folder = make_checkpoint(tmp_path)
    path = only_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
    for quant in ("none", "w8", "w4", "auto"):
        with pytest.raises(qdelta.FileError, match=path.name):
            qdelta.load(folder, quant=quant, progress=False)
