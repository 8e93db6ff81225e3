"""Random tiny checkpoints of every shape and spelling, against the numpy twin in float64.

What the engine may be off by is measured, not guessed: some times what the twin is off by
when it computes in float32 too.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import qdelta
from qdelta import _native
from reference import Config, Reference
from tiny import (
    TEXT_PREFIXES,
    VISION_PREFIXES,
    config_json,
    formula_checkpoint,
    make_checkpoint,
)

ISAS = _native.instruction_sets()
LINEAR, FULL = "linear_attention", "full_attention"


def heads(h_k: int, h_v: int, d_k: int = 16, d_v: int = 16) -> dict:
    return {
        "linear_num_key_heads": h_k,
        "linear_num_value_heads": h_v,
        "linear_key_head_dim": d_k,
        "linear_value_head_dim": d_v,
    }


def layers(*kinds: str) -> dict:
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}


def attention(h_q: int, h_kv: int, head_dim: int) -> dict:
    return {"num_attention_heads": h_q, "num_key_value_heads": h_kv, "head_dim": head_dim}


SHAPES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "1 value head a key head": heads(3, 3),
    "3 value heads a key head": heads(2, 6),
    "4 value heads, one key head": heads(1, 4),
    "one head of all": {**heads(1, 1), **attention(1, 1, 16)},
    "all linear": layers(LINEAR, LINEAR, LINEAR),
    "all full": layers(FULL, FULL),
    "full first": layers(FULL, LINEAR, FULL, FULL, LINEAR),
    "one linear layer": layers(LINEAR),
    "interval 2": {"full_attention_interval": 2, "num_hidden_layers": 6},
    "33 layers": {"num_hidden_layers": 33},
    "kernel 2": {"linear_conv_kernel_dim": 2},
    "kernel 3": {"linear_conv_kernel_dim": 3},
    "kernel 5": {"linear_conv_kernel_dim": 5},
    "grouped by 6": attention(6, 1, 16),
    "not grouped": attention(3, 3, 16),
    "d_v above d_k": heads(2, 4, 8, 24),
    "d_v below d_k": heads(2, 4, 48, 16),
    "dims no multiple of 16": {
        **heads(2, 6, 12, 20),
        **attention(4, 2, 24),
        "hidden_size": 36,
        "intermediate_size": 44,
    },
    "odd dims": {
        **heads(2, 4, 7, 9),
        **attention(2, 1, 10),
        "hidden_size": 33,
        "intermediate_size": 35,
        "vocab_size": 509,
        "tie_word_embeddings": False,
    },
    "wide": {"hidden_size": 320, "intermediate_size": 544, **heads(2, 4, 64, 64)},
    "head size 256": {**attention(2, 1, 256), **heads(2, 4, 128, 128)},
    "eps 1e-5": {"rms_norm_eps": 1e-5},
}
ROPES = {
    "odd dims": {"partial_rotary_factor": 0.4},
    "head size 256": {"partial_rotary_factor": 0.25},
}


def tokens(count: int, vocab: int = 448, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def compare(folder, isa: str | None = None, count: int = 150) -> None:
    """Prefill, decode steps and states of a checkpoint."""
    prompt, steps = tokens(count), tokens(5, seed=1)
    truth, plain = Reference.load(folder, np.float64), Reference.load(folder, np.float32)
    state, rounded = truth.start(), plain.start()
    want = [truth.head(truth.feed(state, part)) for part in (prompt, *([t] for t in steps))]
    near = [plain.head(plain.feed(rounded, part)) for part in (prompt, *([t] for t in steps))]
    want, near = np.concatenate(want), np.concatenate(near)
    bound = 20 * np.abs(near - want).max() + 1e-5 * np.abs(want).max()

    model = qdelta.load(folder, quant="none", kv="f32", isa=isa, threads=2, progress=False)
    session = model._native.session()
    got = []
    for part in (prompt, *([t] for t in steps)):
        session.feed(np.array(part, np.int32), logits="all")
        got.append(session.logits())
    error = np.abs(np.concatenate(got) - want).max()
    assert error <= bound, f"logits off by {error}, bound {bound}"

    for i, layer in enumerate(state.layers):
        ours = session.state(i)
        for part, exact in layer.items():
            assert ours[part].shape == exact.shape, (part, i)
            scale = np.abs(exact).max()
            off = np.abs(rounded.layers[i][part] - exact).max()
            assert np.abs(ours[part] - exact).max() <= 20 * off + 1e-5 * scale, (part, i)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(tmp_path, shape, isa):
    compare(make_checkpoint(tmp_path, SHAPES[shape], ROPES.get(shape), seed=len(shape)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "released"])
def test_dtype(tmp_path, dtype, isa):
    compare(make_checkpoint(tmp_path, dtype=dtype), isa)


SPELLINGS = {
    "one file, no index": {},
    "one file of any name": {"file_name": "weights.safetensors"},
    "index of one": {"shards": 1},
    "index of five": {"shards": 5},
    "text-only prefix": {"prefix": TEXT_PREFIXES[1], "layout": "flat"},
    "converter's prefix": {"prefix": TEXT_PREFIXES[2]},
    "text-only, sharded, untied": {
        "prefix": TEXT_PREFIXES[1],
        "layout": "flat",
        "shards": 2,
        "text": {"tie_word_embeddings": False},
    },
    "rope_scaling": {"rope_style": "rope_scaling"},
    "loose rope fields": {"rope_style": "loose"},
    "with MTP": {"mtp": True},
    "with vision": {"vision": True, "mtp": True},
    "vision, shorter prefix": {"vision": True, "vision_prefix": VISION_PREFIXES[1]},
    "vision, older prefix": {"vision": True, "vision_prefix": VISION_PREFIXES[2]},
    "tied with a spare head": {"spare_head": True},
    "no tokenizer": {"tokenizer": False},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(tmp_path, spelling):
    compare(make_checkpoint(tmp_path, **SPELLINGS[spelling]), count=20)


def test_formula_weights(tmp_path):
    """The model that needs no stored file; vocabulary 16, heads of 4 dims."""
    folder = formula_checkpoint(tmp_path)
    truth = Reference.load(folder, np.float64)
    for isa in ISAS:
        model = qdelta.load(folder, quant="none", kv="f32", isa=isa, progress=False)
        logits = model.logits([3, 1, 4, 1, 5, 9, 2, 6])
        assert logits.argmax(axis=1).tolist() == [9, 11, 10, 14, 11, 4, 7, 10]
        assert np.abs(logits - truth.logits([3, 1, 4, 1, 5, 9, 2, 6])).max() < 1e-4


@pytest.mark.parametrize("quant", ["w8", "w4"])
@pytest.mark.parametrize(
    "shape", ["plain", "untied", "odd dims", "dims no multiple of 16", "3 value heads a key head"]
)
def test_quantised_shapes(tmp_path, shape, quant):
    """Blocks that end in the middle: the logits stay near the unquantised ones."""
    folder = make_checkpoint(tmp_path, SHAPES[shape], ROPES.get(shape), mtp=True)
    model = qdelta.load(folder, quant=quant, threads=2, progress=False)
    got, want = model.logits(tokens(40)), Reference.load(folder).logits(tokens(40))
    assert got.shape == want.shape
    near = np.corrcoef(got.ravel(), want.ravel())[0, 1]
    assert near > {"w8": 0.999, "w4": 0.9}[quant], near


def test_far_positions(tmp_path):
    """Angles of thousands of radians. One full layer, so that nothing else piles up."""
    folder = make_checkpoint(
        tmp_path, layers(FULL), {"rope_theta": 100.0, "partial_rotary_factor": 1.0}
    )
    compare(folder, count=2500)


def test_27b_shapes_are_accepted():
    """48 value heads on 16 key heads, 64 layers: synthetic weights, a narrow model."""
    text = {
        "num_hidden_layers": 64,
        **heads(16, 48, 128, 128),
        **attention(24, 4, 256),
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    config = config_json(text, {"partial_rotary_factor": 0.25})
    assert Config.from_dict(config).conv_dim == 10240
    model = _native.Model.synthetic(json.dumps(config), quant="none")
    session = model.session()
    session.feed(np.array(tokens(5), np.int32), logits="all")
    assert session.logits().shape == (5, 512)
    assert np.isfinite(session.logits()).all()
