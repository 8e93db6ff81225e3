"""Tiny checkpoints in Hugging Face form, made on the spot.

`make_checkpoint` writes random weights of any shape under any spelling in use: name prefixes,
config layouts, shards, dtypes. `formula_checkpoint` writes weights that a formula defines, so
that the values they must give can be stated without stored files. `Container` takes a
safetensors file apart.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reference import Config, mtp_tensors, text_tensors

GOLDEN = Path(__file__).parent / "golden"

# A small model with every feature: 3 linear layers and 1 full one, grouped heads on both sides.
TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "eos_token_id": 448,
    "tie_word_embeddings": True,
}
ROPE = {
    "mrope_interleaved": True,
    "rope_type": "default",
    "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.5,
}
VISION = {
    "model_type": "qwen3_5_vision",
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "deepstack_visual_indexes": [],
}
TEXT_PREFIXES = ("model.language_model.", "model.", "language_model.model.")
VISION_PREFIXES = ("model.visual.", "visual.", "vision_tower.")

# ------------------------------------------------------------------------------ containers


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Numbers as stored, little-endian, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(values, {"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


@dataclass
class Stored:
    """A tensor as a file holds it."""

    dtype: str
    shape: list[int]
    data: bytes

    @staticmethod
    def of(dtype: str, values: np.ndarray) -> Stored:
        return Stored(dtype, list(values.shape), encode(values, dtype))


@dataclass
class Container:
    """A safetensors file in parts, to be put together again, wrongly if need be."""

    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @staticmethod
    def read(path: Path) -> Container:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return Container(
            {
                name: Stored(e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
                for name, e in entries
            },
            metadata,
        )

    def header(self) -> dict:
        """The header of these tensors, one behind the other."""
        header: dict = {"__metadata__": self.metadata}
        end = 0
        for name, t in self.tensors.items():
            begin, end = end, end + len(t.data)
            header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, end]}
        return header

    def write(self, path: Path, header: dict | str | bytes | None = None) -> Path:
        """Write the file, under another header than its own if one is given."""
        header = self.header() if header is None else header
        if isinstance(header, dict):
            header = json.dumps(header)
        raw = header.encode() if isinstance(header, str) else header
        raw += b" " * (-len(raw) % 8)
        data = b"".join(t.data for t in self.tensors.values())
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        return path


def only_file(folder: Path) -> Path:
    """The one safetensors file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


# ----------------------------------------------------------------------------- checkpoints


def vision_tensors(v: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the vision tower and its shape, under names without a prefix."""
    size, ff, out = v["hidden_size"], v["intermediate_size"], v["out_hidden_size"]
    patch, merged = v["patch_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    pairs = {
        "patch_embed.proj": (size, v["in_channels"], v["temporal_patch_size"], patch, patch),
        **{
            f"blocks.{i}.{name}": shape
            for i in range(v["depth"])
            for name, shape in {
                "norm1": (size,),
                "norm2": (size,),
                "attn.qkv": (3 * size, size),
                "attn.proj": (size, size),
                "mlp.linear_fc1": (ff, size),
                "mlp.linear_fc2": (size, ff),
            }.items()
        },
        "merger.norm": (size,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (out, merged),
    }
    shapes: dict[str, tuple[int, ...]] = {"pos_embed.weight": (v["num_position_embeddings"], size)}
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values that let every parameter show in the logits and keep activations near one."""
    noise = rng.standard_normal(shape)
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.05, 4, shape))
    if name.endswith(("embed_tokens.weight", "dt_bias")):
        return noise
    if name.endswith("conv1d.weight"):
        return noise * 0.5
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * noise
    if len(shape) == 1:
        return 0.2 * noise
    return noise * 1.5 / np.sqrt(np.prod(shape[1:]))


def config_json(
    text: dict | None = None,
    rope: dict | None = None,
    *,
    layout: str = "nested",
    rope_style: str = "rope_parameters",
    vision: bool = False,
) -> dict:
    """A config.json around overrides of `TEXT` and `ROPE`; an override of None drops the key.

    `mrope_section` is made to fit unless given.
    layout: "nested" (`text_config`) or "flat" (text fields at the top, as text-only files
    have it). rope_style: "rope_parameters", "rope_scaling" (older: `type`), or "loose" (fields
    beside the others, no section).
    """

    def merged(base: dict, extra: dict | None) -> dict:
        return {k: v for k, v in {**base, **(extra or {})}.items() if v is not None}

    fields, rope = merged(TEXT, text), merged(ROPE, rope)
    frequencies = int(fields["head_dim"] * rope["partial_rotary_factor"]) // 2
    third = frequencies // 3
    rope.setdefault("mrope_section", [frequencies - 2 * third, third, third])
    if rope_style == "rope_parameters":
        fields["rope_parameters"] = rope
    elif rope_style == "rope_scaling":
        rope["type"] = rope.pop("rope_type")
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = rope
    else:
        fields |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor")}
    if layout == "flat":
        return {"architectures": ["Qwen3_5ForCausalLM"], **fields}
    whole = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": fields,
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
    }
    if vision:
        whole["vision_config"] = {**VISION, "out_hidden_size": fields["hidden_size"]}
    return whole


def make_checkpoint(
    folder: Path,
    text: dict | None = None,
    rope: dict | None = None,
    *,
    dtype: str = "BF16",
    shards: int = 0,
    prefix: str = TEXT_PREFIXES[0],
    layout: str = "nested",
    rope_style: str = "rope_parameters",
    mtp: bool = False,
    vision: bool = False,
    vision_prefix: str = VISION_PREFIXES[0],
    spare_head: bool = False,
    file_name: str = "model.safetensors",
    seed: int = 0,
    tokenizer: bool = True,
) -> Path:
    """Write a random checkpoint and return its folder.

    text, rope: overrides, see `config_json`. dtype: "BF16", "F16", "F32", or "released", BF16
    but for the two F32 tensors of a linear layer. shards: 0 writes one file without an index,
    n >= 1 writes n files under the released names and an index. spare_head: a tied checkpoint
    that carries an `lm_head.weight` all the same, with values nobody may use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(text, rope, layout=layout, rope_style=rope_style, vision=vision)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    c = Config.from_dict(config)

    shapes = {}
    for name, shape in text_tensors(c).items():
        shapes[name if name == "lm_head.weight" else prefix + name] = shape
    if spare_head:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    if mtp:
        shapes |= mtp_tensors(c)
    if vision:
        tower = vision_tensors(config["vision_config"])
        shapes |= {vision_prefix + name: shape for name, shape in tower.items()}

    rng = np.random.default_rng(seed)
    tensors = {
        name: Stored.of(stored_dtype(name, dtype), random_values(name, shape, rng))
        for name, shape in shapes.items()
    }
    write_shards(folder, tensors, shards, file_name)
    if tokenizer:
        for source in (GOLDEN / "tiny-text" / "tiny-f32").iterdir():
            if source.name not in ("config.json", "model.safetensors"):
                shutil.copyfile(source, folder / source.name)
    return folder


def stored_dtype(name: str, dtype: str) -> str:
    if dtype != "released":
        return dtype
    return "F32" if name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"


def write_shards(folder: Path, tensors: dict[str, Stored], shards: int, file_name: str) -> None:
    if shards == 0:
        Container(tensors).write(folder / file_name)
        return
    weight_map = {}
    for i in range(shards):
        names = list(tensors)[i::shards]
        shard = f"model.safetensors-{i + 1:05}-of-{shards:05}.safetensors"
        Container({name: tensors[name] for name in names}).write(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    total = sum(len(t.data) for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ------------------------------------------------------------------------- formula weights


def formula(counter: int, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Tensor number `counter`: an integer hash of the element's index, as float64 in +-scale."""
    mask = np.uint64(0xFFFFFFFF)
    i = np.arange(np.prod(shape), dtype=np.uint64)
    x = (i * np.uint64(2654435761) + np.uint64(counter * 40503 + 12345)) & mask
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & mask
    x ^= x >> np.uint64(13)
    return ((x / 2.0**32 - 0.5) * 2 * scale).reshape(shape)


FORMULA_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "eos_token_id": None,
}
FORMULA_SCALES = {  # by the last part of the name; all others 0.6
    "embed_tokens.weight": 1.0,
    "A_log": 1.0,
    "dt_bias": 1.0,
    "linear_attn.norm.weight": 1.0,
    "input_layernorm.weight": 0.3,
    "post_attention_layernorm.weight": 0.3,
    "q_norm.weight": 0.3,
    "k_norm.weight": 0.3,
}


def formula_model() -> tuple[dict, dict[str, np.ndarray]]:
    """The config.json and the float64 weights, under names without a prefix."""
    config = config_json(FORMULA_TEXT)
    weights = {}
    for counter, (name, shape) in enumerate(text_tensors(Config.from_dict(config)).items()):
        scale = next((s for end, s in FORMULA_SCALES.items() if name.endswith(end)), 0.6)
        weights[name] = formula(counter, shape, 0.3 if name == "norm.weight" else scale)
    return config, weights


def formula_checkpoint(folder: Path) -> Path:
    """Write the formula model in F32 and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = formula_model()
    (folder / "config.json").write_text(json.dumps(config))
    Container(
        {TEXT_PREFIXES[0] + name: Stored.of("F32", values) for name, values in weights.items()}
    ).write(folder / "model.safetensors")
    return folder
