"""The released sizes, for benchmarks with random weights at their true shapes."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}


def _size(
    hidden: int, layers: int, intermediate: int, heads: tuple[int, int], values: int, tied: bool
) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "linear_num_value_heads": values,
        "tie_word_embeddings": tied,
    }


# config.json of each size, text part.
SIZES: dict[str, dict[str, Any]] = {
    "0.8B": _size(1024, 24, 3584, (8, 2), 16, True),
    "2B": _size(2048, 24, 6144, (8, 2), 16, True),
    "4B": _size(2560, 32, 9216, (16, 4), 32, True),
    "9B": _size(4096, 32, 12288, (16, 4), 32, False),
}


def parameters(config: dict[str, Any]) -> int:
    """Number of parameters of the text model that a config describes."""
    text = config.get("text_config", config)
    d, vocab = text["hidden_size"], text["vocab_size"]
    d_k, d_v = text["linear_key_head_dim"], text["linear_value_head_dim"]
    keys, values = text["linear_num_key_heads"] * d_k, text["linear_num_value_heads"] * d_v
    conv, h_v = 2 * keys + values, text["linear_num_value_heads"]
    linear = d * (conv + 2 * values + 2 * h_v) + conv * text["linear_conv_kernel_dim"]
    linear += 2 * h_v + d_v
    head = text["head_dim"]
    q, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    full = d * (3 * q + 2 * kv) + 2 * head
    layers = text["num_hidden_layers"]
    interval = text.get("full_attention_interval", 4)
    types = text.get("layer_types")
    n_full = types.count("full_attention") if types else layers // interval
    every = 2 * d + 3 * d * text["intermediate_size"]
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    head_and_embedding = vocab * d * (1 if tied else 2)
    total = head_and_embedding + d + layers * every + n_full * full + (layers - n_full) * linear
    return int(total)


def name_of(config: dict[str, Any]) -> str:
    """The released size with these dimensions, or the number of parameters."""
    text = config.get("text_config", config)
    for name, size in SIZES.items():
        keys = ("hidden_size", "num_hidden_layers", "intermediate_size")
        if all(text.get(key) == size[key] for key in keys):
            return name
    return f"{parameters(config) / 1e6:.1f}M"
