"""What a token costs by part of the model: bytes to move, operations to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .sizes import parameters

if TYPE_CHECKING:
    from . import _native


def decode_bytes(model: _native.Model, depth: int) -> dict[str, int]:
    """Bytes that a token moves after `depth` others, by the part of a profile that moves them.

    Weights, states and cache read once. States are also written, but not for each token, which is
    not counted. A screened head works when the sampler asks.
    """
    plan = model.memory_plan(max(depth, 1))
    return {
        "matrices": model.weight_bytes - model.head_bytes,
        "delta_rule": plan.state,
        "attention": plan.kv if depth else 0,
        "sampling" if model.head == "screened" else "head": model.head_bytes,
    }


def prefill_operations(config: dict[str, Any], positions: float) -> dict[str, float]:
    """Operations of a prompt's token that attends to `positions`, a product and a sum two.

    Two for a weight of the layers; seven for each element of the recurrent states; four for each
    position and each element of a query head, in key and value. Of a full-attention layer at the
    end, nobody reads more than keys and values, but for the last token; that one and the head,
    which reads no other, are not counted.
    """
    text = config.get("text_config", config)
    head = text["vocab_size"] * text["hidden_size"]
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    layers, interval = text["num_hidden_layers"], text.get("full_attention_interval", 4)
    full = layers // interval
    linear = layers - full
    queries = text["num_attention_heads"] * text["head_dim"]
    weights = parameters(config) - (head if tied else 2 * head)
    if layers % interval == 0:
        full -= 1
        # Queries with their gates, output projection, MLP.
        weights -= text["hidden_size"] * (3 * queries + 3 * text["intermediate_size"])
    state = text["linear_num_value_heads"] * text["linear_key_head_dim"]
    state *= linear * text["linear_value_head_dim"]
    return {
        "matrices": 2 * weights,
        "delta_rule": 7 * state,
        "attention": 4 * full * queries * positions,
    }
