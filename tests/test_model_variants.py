"""Random tiny checkpoints of every shape and spelling, against the numpy twin in float64.

What the engine may be off by is measured, not guessed: some times what the twin is off by
when it computes in float32 too.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import reference
from qdelta import _native
from reference import Config, Reference, widen
from tiny import (
    TEXT_PREFIXES,
    VISION_PREFIXES,
    Container,
    Stored,
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
    "rows of 128 and 256": {"hidden_size": 256, "intermediate_size": 128},
    "head size 256": {**attention(2, 1, 256), **heads(2, 4, 128, 128)},
    "eps 1e-5": {"rms_norm_eps": 1e-5},
}
ROPES = {
    "odd dims": {"partial_rotary_factor": 0.4},
    "head size 256": {"partial_rotary_factor": 0.25},
}


def tokens(count: int, vocab: int = 448, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def open_model(path, isa: str | None = None) -> _native.Model:
    return _native.Model(_native.Checkpoint(str(path)), kv="f32", isa=isa, threads=2)


def logits(model: _native.Model, ids: list[int]) -> np.ndarray:
    """Logits of all tokens of a fresh timeline."""
    session = model.session()
    session.feed(np.array(ids, np.int32), logits="all")
    return session.logits()


def compare(folder, isa: str | None = None, count: int = 150) -> None:
    """Prefill, decode steps and states of a checkpoint."""
    prompt, steps = tokens(count), tokens(5, seed=1)
    truth, plain = Reference.load(folder, np.float64), Reference.load(folder, np.float32)
    state, rounded = truth.start(), plain.start()
    want = [truth.head(truth.feed(state, part)) for part in (prompt, *([t] for t in steps))]
    near = [plain.head(plain.feed(rounded, part)) for part in (prompt, *([t] for t in steps))]
    want, near = np.concatenate(want), np.concatenate(near)
    bound = 20 * np.abs(near - want).max() + 1e-5 * np.abs(want).max()

    session = open_model(folder, isa).session()
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
        got = logits(open_model(folder, isa), [3, 1, 4, 1, 5, 9, 2, 6])
        assert got.argmax(axis=1).tolist() == [9, 11, 10, 14, 11, 4, 7, 10]
        assert np.abs(got - truth.logits([3, 1, 4, 1, 5, 9, 2, 6])).max() < 1e-4


def decode_packed(stored: Stored, kind: str, rows: int, cols: int) -> np.ndarray:
    """A packed matrix, read as docs/formats.md has it: [panels, blocks of 16 rows x 64 columns].

    A block begins with 2 x 16 scales, of its column groups and rows. Codes follow in steps that
    hold 4 bytes of every row: 8-bit codes around 128, or pairs of 4-bit codes around 8, of which
    the low ones are columns 8 step + i and the high ones 8 step + 4 + i. In two planes, blocks of
    the upper four bits of codes come first, then those of the lower bits, without scales: four of
    8-bit codes around 128, or two of 5-bit codes around 16, the last bits of a group in 64 bytes.
    """
    if kind == "q8_0":  # rows of blocks: a scale and 32 codes
        blocks = np.frombuffer(stored.data, np.uint8).reshape(rows, -1, 34)
        scales = blocks[..., :2].copy().view("<f2").astype(np.float64)
        return (blocks[..., 2:].view(np.int8) * scales).reshape(rows, cols)
    panels = stored.shape[0]
    data = np.frombuffer(stored.data, np.uint8)
    if kind.endswith("_r"):
        return decode_row_scaled(data.reshape(panels, -1), kind)[:rows, :cols]
    low = None
    if kind.endswith("_planes"):
        high = len(data) // (1088 if kind == "w8_planes" else 704) * 576
        data, low = data[:high], data[high:]
    blocks = data.reshape(panels, -1, 1088 if kind == "w8" else 576)
    scales = blocks[..., :64].copy().view("<f2").reshape(panels, -1, 2, 16).astype(np.float64)

    def steps(codes: np.ndarray) -> np.ndarray:
        return codes.reshape(panels, blocks.shape[1], -1, 16, 4).astype(np.int64)

    def nibbles(codes: np.ndarray) -> np.ndarray:
        return np.concatenate([steps(codes) & 15, steps(codes) >> 4], axis=-1)

    if kind == "w8":
        codes = steps(blocks[..., 64:]) - 128
    elif low is None:
        codes = nibbles(blocks[..., 64:]) - 8
    elif kind == "w5_planes":
        bits = [steps(low) >> shift & 1 for shift in range(8)]  # of four columns each
        bits = np.stack([np.concatenate(bits[i : i + 2], axis=-1) for i in (0, 2, 4, 6)], axis=3)
        bits = bits.reshape(panels, blocks.shape[1], -1, 16, 8)
        codes = 2 * nibbles(blocks[..., 64:]) + bits - 16
    else:
        codes = 16 * nibbles(blocks[..., 64:]) + nibbles(low) - 128
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(panels, 16, -1, 2, 32)  # row, block, group
    weights = codes * scales.transpose(0, 3, 1, 2)[..., None]
    return weights.reshape(panels * 16, -1)[:rows, :cols]


def decode_row_scaled(data: np.ndarray, kind: str) -> np.ndarray:
    """Panels of 16 rows: 16 f32 units, then blocks of 128 columns.

    A block begins with 4 x 16 signed factors, of its column groups and rows. The codes of a group
    are 4-bit codes around 8, as in w4, or eight steps of 5-bit codes around 16 in five.
    """
    panels = len(data)
    units = data[:, :64].copy().view("<f4").astype(np.float64)
    blocks = data[:, 64:].reshape(panels, -1, {"w4_r": 1088, "w5_r": 1344}[kind])
    factors = blocks[..., :64].view(np.int8).reshape(panels, -1, 4, 16)
    codes = blocks[..., 64:].reshape(panels, blocks.shape[1], 4, -1, 16, 4).astype(np.int64)
    if kind == "w4_r":
        numbers = np.concatenate([codes & 15, codes >> 4], axis=-1) - 8  # eight columns a step
    else:
        v = np.moveaxis(codes, 3, 0)
        steps = [*(v & 31)]
        steps.append((v[0] >> 5) + 8 * (v[1] >> 6))
        steps.append((v[2] >> 5) + 8 * (v[3] >> 6))
        steps.append((v[4] >> 5) + 8 * (v[1] >> 5 & 1) + 16 * (v[3] >> 5 & 1))
        numbers = np.stack(steps, axis=3) - 16  # four columns a step
    numbers = numbers * factors[..., None, :, None]
    numbers = numbers.transpose(0, 4, 1, 2, 3, 5).reshape(panels, 16, -1)
    return (numbers * units[..., None]).reshape(panels * 16, -1)


def round_to_codes(x: np.ndarray, group: int = 32) -> np.ndarray:
    """Rows as 8-bit codes, a scale for each group of columns: activations, q, k, v, softmax."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    scales = np.abs(padded).max(axis=2, keepdims=True) / 127
    codes = np.round(padded / np.where(scales > 0, scales, 1))
    return (codes * scales).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("quant", ["w8", "w4"])
@pytest.mark.parametrize(
    "shape",
    [
        *("plain", "untied", "odd dims", "dims no multiple of 16", "3 value heads a key head"),
        "rows of 128 and 256",
    ],
)
def test_quantised_shapes(tmp_path, monkeypatch, shape, quant):
    """Weights in blocks that end in the middle, and logits as the twin has them of the same.

    The twin rounds activations too, so it agrees until the first one that lies between two
    codes; from there on the difference is that of a code. In deep random models it would grow.
    """
    text = {**SHAPES[shape], **layers(LINEAR, FULL)}
    folder = make_checkpoint(tmp_path, text, ROPES.get(shape), mtp=True)
    out = tmp_path / "converted.safetensors"
    _native.convert(_native.Checkpoint(str(folder)), str(out), quant=quant, attachments=[])
    exact, packed, decoded = Reference.load(folder), Container.read(out).tensors, {}
    for name, w in exact.weights.items():
        stem = name.removesuffix(".weight")
        kinds = ("w4", "w4_r", "w5_r", "w5_planes", "w8", "w8_planes", "q8_0")
        kind = next((k for k in kinds if f"{stem}.{k}" in packed), None)
        if kind is None:
            stored = packed[name]
            decoded[name] = widen(stored.dtype, stored.data).reshape(w.shape)
            np.testing.assert_array_equal(decoded[name], w, name)
            continue
        decoded[name] = decode_packed(packed[f"{stem}.{kind}"], kind, *w.shape)
        groups = np.pad(np.abs(w), ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
        largest = np.repeat(groups.max(axis=2), 32, axis=1)[:, : w.shape[1]]
        error = np.abs(decoded[name] - w)
        most, mean = {
            "w4": (1 / 6, 0.12),
            "w4_r": (1 / 6, 0.12),
            "w5_r": (1 / 13, 0.06),
            "w5_planes": (1 / 13, 0.06),
        }.get(kind, (1 / 127, 0.01))
        assert np.all(error <= largest * most), name
        if most == 1 / 127:  # the search is not worse than rounding to steps of largest / 127
            assert np.mean(error**2) <= np.mean((0.51 / 127 * largest) ** 2), name
        assert np.sqrt(np.mean(error**2) / np.mean(w**2)) < mean, name
    twin = Reference(exact.config, decoded, np.float64)
    monkeypatch.setattr(reference, "linear", lambda x, w: round_to_codes(x) @ w.T)
    want = twin.logits(tokens(40))
    if shape == "rows of 128 and 256" and quant == "w4":
        assert {"layers.0.mlp.up_proj.w4_r", "layers.1.self_attn.k_proj.w5_r"} <= packed.keys()
    for isa in ISAS:
        error = (logits(open_model(out, isa), tokens(40)) - want) / want.std()
        assert np.abs(error[:4]).max() < 1e-4, isa
        assert np.sqrt(np.mean(error**2)) < 0.015, isa


def test_far_positions(tmp_path):
    """Angles of thousands of radians. One full layer, so that nothing else piles up."""
    folder = make_checkpoint(
        tmp_path, layers(FULL), {"rope_theta": 100.0, "partial_rotary_factor": 1.0}
    )
    compare(folder, count=2500)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8"])
def test_memory_plan_counts_the_cache(tmp_path, kv):
    """A session of whole chunks takes the planned bytes, and its tokens."""
    folder = make_checkpoint(tmp_path / "model", text=attention(4, 2, 48), seed=1)
    model = _native.Model(_native.Checkpoint(str(folder)), kv=kv, threads=2)
    session = model.session()
    session.feed(np.array(tokens(512), np.int32), logits="none")
    plan = model.memory_plan(512)
    assert session.snapshot().nbytes == plan.kv + plan.state + 4 * 512


def attend_q8(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`reference.attend` with a q8 cache, as docs/formats.md has it."""
    tokens, h_q, head_dim = q.shape
    h_kv, n, _ = keys.shape
    visible = np.arange(n)[None, :] <= np.arange(n - tokens, n)[:, None]
    y = np.empty_like(q)
    for h in range(h_q):
        kv = h // (h_q // h_kv)
        scores = round_to_codes(q[:, h], 64) @ round_to_codes(keys[kv], 64).T * head_dim**-0.5
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        scales = np.abs(values[kv]).max(axis=1) / 127
        codes = np.round(values[kv] / scales[:, None])
        y[:, h] = round_to_codes(p * scales) @ codes / p.sum(axis=1, keepdims=True)
    return y


@pytest.mark.parametrize("head_dim", [32, 72])
def test_q8_logits(tmp_path, monkeypatch, head_dim):
    """The same as the twin's but where rounding turns a code, and near those of an f32 cache."""
    text = {**layers(FULL), **attention(8, 2, head_dim)}
    folder = make_checkpoint(tmp_path / "model", text=text, seed=1)
    exact = Reference.load(folder, np.float64).logits(tokens(150))
    monkeypatch.setattr(reference, "attend", attend_q8)
    want = Reference.load(folder, np.float64).logits(tokens(150))
    for isa in ISAS:
        model = _native.Model(_native.Checkpoint(str(folder)), kv="q8", isa=isa, threads=2)
        got = logits(model, tokens(150))
        error = np.abs(got - want).max(axis=1) / want.std()
        assert np.median(error) < 1e-5, isa
        assert error.max() < 0.02, isa
        assert np.sqrt(np.mean((got - exact) ** 2)) / exact.std() < 0.01, isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [32, 48, 72, 256])
def test_q8_cache(tmp_path, head_dim, isa):
    """Keys and values within half a step of f32; the same bytes and bits in any cut.

    The only layer is a full one: its keys and values depend on nothing that rounds differently.
    """
    text = {**layers(FULL), **attention(8, 2, head_dim)}
    folder = make_checkpoint(tmp_path / "model", text=text, seed=1)
    checkpoint = _native.Checkpoint(str(folder))
    ids = np.array(tokens(1100), np.int32)

    def feed(cuts: list[int], threads: int = 2, kv: str = "q8") -> tuple[dict, np.ndarray]:
        session = _native.Model(checkpoint, kv=kv, isa=isa, threads=threads).session()
        for part in np.split(ids, cuts):
            session.feed(part, logits="last")
        return session.state(0), session.logits()

    exact, _ = feed([], kv="f32")
    state, _ = feed([])
    for part, group in (("key", 64), ("value", head_dim)):
        for first in range(0, head_dim, group):
            want = exact[part][..., first : first + group]
            step = np.abs(want).max(axis=-1, keepdims=True) / 127
            error = np.abs(state[part][..., first : first + group] - want)
            assert (error <= 0.5001 * step).all(), (part, first)

    cuts = [1, 2, 3, 4, 15, 16, 17, 255, 256, 257, 600, 1090, *range(1091, 1100)]
    pieces, row = feed(cuts)
    for part in ("key", "value"):
        np.testing.assert_array_equal(pieces[part], state[part])
    for threads in (1, 3, 8):
        np.testing.assert_array_equal(feed(cuts, threads)[1], row)


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
    got = logits(_native.Model.synthetic(json.dumps(config), quant="none"), tokens(5))
    assert got.shape == (5, 512)
    assert np.isfinite(got).all()
