"""Damaged, contradictory and malicious files: an exception that names the place, nothing else.

The files are opened through the extension, which reads no more than it must. What could end
the process, by exhausting memory or stack or by a signal, runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import qdelta
from qdelta import _native
from tiny import TEXT_PREFIXES, VISION_PREFIXES, Container, Stored, make_checkpoint, only_file

PREFIX = TEXT_PREFIXES[0]
LAYER = f"{PREFIX}layers.0."
FULL = f"{PREFIX}layers.3."
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", tokenizer=False, mtp=True)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "sharded", tokenizer=False, shards=3)


def open_model(path: Path) -> None:
    """Open and bind: everything that may look at the files."""
    session = _native.Model(_native.Checkpoint(str(path)), threads=1).session()
    session.feed(np.array([1, 2, 3], np.int32))


def refuses(path: Path, *words: str, kind=(qdelta.FileError, qdelta.UnsupportedError)) -> str:
    """The message with which a checkpoint is refused; it has all the words."""
    with pytest.raises(kind) as caught:
        open_model(path)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{message!r} lacks {word!r}"
    return message


def edit_config(folder: Path, **changes) -> None:
    """Change text fields of config.json; None removes one, `rope__x` changes a rope field."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        fields = config["text_config"]
        if key.startswith("rope__"):
            fields, key = fields["rope_parameters"], key.removeprefix("rope__")
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    path.write_text(json.dumps(config))


def test_untouched_checkpoints_open(folder, sharded):
    open_model(folder)
    open_model(sharded)


# ------------------------------------------------------------------------- the container


def test_every_truncation(folder):
    """Cut anywhere: in the length, in the header, in the data."""
    path = only_file(folder)
    raw = path.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    cuts = {*range(10), *range(8, 8 + header, 101), 7 + header, 8 + header, 9 + header}
    cuts |= {*range(8 + header, len(raw), 5003), len(raw) - 1, len(raw) - 2}
    for cut in sorted(cuts):
        path.write_bytes(raw[:cut])
        refuses(folder, path.name, kind=qdelta.FileError)


def test_appended_bytes(folder):
    path = only_file(folder)
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    refuses(folder, path.name)


@pytest.mark.parametrize(
    "length", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001, 2**64 - 8]
)
def test_header_length(folder, length):
    path = only_file(folder)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refuses(folder, path.name, kind=qdelta.FileError)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        b"\xff\xfe{}",
        b'{"a\xff": 1}',
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"__metadata__": 3}',
        '{"__metadata__": {"a": {"b": 1}}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1, 2]}}',
        '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": 32, "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_header_that_is_none(folder, header):
    path = only_file(folder)
    Container.read(path).write(path, header)
    message = refuses(folder)
    assert path.name in message or "embed_tokens" in message


NAME = f"{LAYER}mlp.up_proj.weight"  # BF16 [48, 32], 3072 bytes


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [4096, 1024]},
        {"data_offsets": [0, 3072]},
        {"data_offsets": [-3072, 0]},
        {"data_offsets": [2**63, 2**63 + 3072]},
        {"data_offsets": [2**64 - 3072, 2**64]},
        {"data_offsets": [0.5, 3072.5]},
        {"data_offsets": ["0", "3072"]},
        {"data_offsets": [10**9, 10**9 + 3072]},
        {"shape": [48, 33]},
        {"shape": [48, -32]},
        {"shape": [2**32, 2**32]},
        {"shape": [2**63, 2]},
        {"shape": [2**64, 1]},
        {"shape": [1] * 100_000},
        {"dtype": "F32"},
        {"dtype": "F64"},
        {"dtype": "bfloat16"},
        {"dtype": ""},
    ],
    ids=lambda change: str(change)[:50],
)
def test_header_entry(folder, change):
    """One entry that lies about its place, its shape or its type."""
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    header[NAME].update(change)
    container.write(path, header)
    refuses(folder, path.name, kind=qdelta.FileError)


def test_overlap_names_file_and_tensor(folder):
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    offsets = header[NAME]["data_offsets"]
    header[NAME]["data_offsets"] = [offset - 64 for offset in offsets]
    container.write(path, header)
    refuses(folder, path.name, "tensor `")


def test_one_name_twice(folder):
    path = only_file(folder)
    container = Container.read(path)
    text = json.dumps(container.header())
    entry = json.dumps(container.header()[NAME])
    container.write(path, f'{text[:-1]}, "{NAME}": {entry}}}')
    refuses(folder, path.name, NAME)


def test_two_spellings_of_one_tensor(folder):
    """Under two prefixes: which one counts is a question, not a choice to be made."""
    path = only_file(folder)
    container = Container.read(path)
    name = NAME.replace(PREFIX, TEXT_PREFIXES[1])
    container.tensors[name] = Stored.of("BF16", np.ones((48, 32)))
    container.write(path)
    refuses(folder, path.name, "up_proj")


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
    container.tensors["extra"] = Stored("I64", [1], bytes(8))
    container.write(path)
    open_model(folder)


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
    ({"rope__rope_type": "yarn"}, "rope_type", "yarn"),
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


# ---------------------------------------------------------------- what could end the process


def run(code: str, *args: object, memory: int = 2**31) -> subprocess.CompletedProcess:
    """Python code in a process with an upper bound to its memory, ended after a minute."""
    head = """
        import sys
        import numpy as np
        import qdelta
        from qdelta import _native
        try:
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        except ImportError:
            pass
    """
    program = textwrap.dedent(head).replace("MEMORY", str(memory)) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


OPEN = """
    try:
        session = _native.Model(_native.Checkpoint(sys.argv[1]), threads=1).session()
        session.feed(np.array([1, 2], np.int32))
        print("fine")
    except qdelta.Error as error:
        print(type(error).__name__, error)
"""


def assert_survives(done: subprocess.CompletedProcess, *kinds: str) -> None:
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.startswith(kinds), done.stdout[:500]


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"__metadata__": {"a": ['])
def test_deep_nesting(folder, opening):
    """No stack is deep enough for a million brackets."""
    path = only_file(folder)
    Container.read(path).write(path, opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")
    make_checkpoint(folder, tokenizer=False)
    (folder / "config.json").write_text(opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")
    make_checkpoint(folder, tokenizer=False)
    (folder / INDEX).write_text(opening * 1_000_000)
    assert_survives(run(OPEN, folder), "FileError")


def test_a_million_tensors(folder):
    """A long header is slow at the worst."""
    path = only_file(folder)
    container = Container.read(path)
    header = container.header()
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header |= {f"t{i}": entry for i in range(300_000)}
    container.write(path, header)
    assert_survives(run(OPEN, folder), "fine", "FileError")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": 2**21},
        {"hidden_size": 2**21, "vocab_size": 2**21},
        {"linear_num_value_heads": 2**20, "linear_value_head_dim": 2**20},
        {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20},
        {"linear_conv_kernel_dim": 2**21},
        {"max_position_embeddings": 2**21},
    ],
    ids=str,
)
def test_huge_sizes_allocate_nothing(folder, changes):
    edit_config(folder, **changes)
    assert_survives(run(OPEN, folder, memory=2**30), "FileError", "UnsupportedError", "fine")


def test_empty_matrix_of_endless_rows(folder):
    """A shape of no bytes passes the container; it must not pass the model."""
    path = only_file(folder)
    container = Container.read(path)
    container.tensors[NAME] = Stored("BF16", [2**62, 0], b"")
    container.write(path)
    assert_survives(run(OPEN, folder), "FileError")


@pytest.mark.parametrize("change", ["shorter", "empty", "longer", "gone", "rewritten"])
def test_file_changes_between_opening_and_use(folder, change):
    """A file cut short under a mapping would be a SIGBUS; it is noticed before it is read."""
    code = """
        import os, time
        path, change = sys.argv[2:]
        checkpoint = _native.Checkpoint(sys.argv[1])
        size = os.path.getsize(path)
        time.sleep(0.02)
        if change == "gone":
            os.unlink(path)
        elif change == "rewritten":
            raw = open(path, "rb").read()
            open(path, "wb").write(raw)
        else:
            os.truncate(path, {"shorter": size // 2, "empty": 0, "longer": size + 4096}[change])
        try:
            _native.Model(checkpoint, threads=1).session().feed(np.array([1, 2], np.int32))
            print("fine")
        except qdelta.Error as error:
            print(type(error).__name__, error)
    """
    path = only_file(folder)
    done = run(code, folder, path, change)
    kinds = {"gone": ("FileAccessError", "FileError", "fine")}.get(change, ("FileError",))
    assert_survives(done, *kinds)
    if not done.stdout.startswith("fine"):
        assert path.name in done.stdout


def test_random_damage(folder):
    """A few bytes changed anywhere: an error or a model, never a crash."""
    code = """
        import pathlib, random
        path = pathlib.Path(sys.argv[2])
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        rng = random.Random(7)
        for _ in range(300):
            raw = bytearray(good)
            for _ in range(rng.choice([1, 1, 2, 8])):
                raw[rng.randrange(header)] = rng.choice(b'0123456789[]{},:"\\\\ \\xff-e.')
            path.write_bytes(raw)
            try:
                session = _native.Model(_native.Checkpoint(sys.argv[1]), threads=1).session()
                session.feed(np.array([1, 2], np.int32))
            except qdelta.Error as error:
                assert str(error)
        print("done")
    """
    assert_survives(run(code, folder, only_file(folder)), "done")


# ------------------------------------------------------------------------- converted files


@pytest.fixture
def converted(folder, tmp_path) -> Path:
    out = tmp_path / "model-w8.safetensors"
    _native.convert(_native.Checkpoint(str(folder)), str(out), quant="w8", attachments=[])
    return out


def test_converted_file_opens(converted):
    open_model(converted)
    assert _native.Checkpoint(str(converted)).quant == "w8"


def test_converted_truncations(converted):
    raw = converted.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    for cut in {0, 7, 8, 100, 8 + header, len(raw) // 2, len(raw) - 1}:
        converted.write_bytes(raw[:cut])
        refuses(converted, converted.name, kind=qdelta.FileError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qdelta.version", "999"),
        ("qdelta.version", "x"),
        ("qdelta.version", None),
        ("qdelta.quant", "w3"),
        ("qdelta.quant", "w4"),
        ("qdelta.quant", None),
        ("qdelta.config", None),
        ("qdelta.config", "{}"),
        ("qdelta.config", "["),
    ],
)
def test_converted_metadata(converted, key, value):
    """Same length or not, metadata that lies is refused."""
    raw = converted.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))  # data stays where it was
    converted.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refuses(converted)


def test_converted_tensor_of_another_shape(converted):
    raw = converted.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = next(name for name in header if name.endswith("up_proj.w8"))
    rows, cols = header[name]["shape"]
    assert rows == 3
    header[name]["shape"] = [1, 3 * cols]
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))
    converted.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refuses(converted, converted.name, name, kind=qdelta.FileError)
