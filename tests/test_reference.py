"""The numpy twin against stored values: what everything else is compared with.

Cases are read from the files under tests/golden; more files or cases of the same kind are
taken up as they are found there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from golden_data import DEMO, MODELS, OPS, Tensors, assert_close, cases, golden_model, prompts
from reference import (
    Config,
    Reference,
    Yarn,
    attend,
    conv1d_silu,
    delta_rule,
    delta_rule_chunked,
    gated_rms_norm,
    gates,
    inverse_frequencies,
    l2_norm,
    linear,
    mlp,
    mrope_axes,
    rms_norm,
    rope_tables,
    rotate,
    sigmoid,
    softplus,
    text_tensors,
    yarn_range,
)
from tiny import config_json, formula, formula_model, make_checkpoint, random_values

EPS = 1e-6
YARN = {"factor": 4.0, "original_max_position_embeddings": 262144}
DEMO_FOLDER = Path(__file__).parents[1] / "python" / "qdelta" / "demo"

# --------------------------------------------------------------------------------- the ops


def files(kind: str) -> list:
    """The files of golden/ops whose name begins with `kind`, one parameter each."""
    found = sorted(OPS.glob(f"{kind}*.safetensors"))
    assert found, kind
    return [pytest.param(path, id=path.stem) for path in found]


@pytest.mark.parametrize("form", ["recurrent", "chunk-64", "chunk-17"])
@pytest.mark.parametrize("path", files("delta_rule"))
def test_delta_rule(path, form):
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "beta"):
        v = case["v"]
        q = l2_norm(case["q"]) * np.float32(case["q"].shape[-1] ** -0.5)
        k = l2_norm(case["k"])
        zero = np.zeros((v.shape[1], k.shape[2], v.shape[2]), np.float32)
        s = case.get("initial_state", zero)
        args = (q, k, v, case["g"], case["beta"], s)
        if form == "recurrent":
            y, s = delta_rule(*args)
        else:
            y, s = delta_rule_chunked(*args, chunk=int(form.removeprefix("chunk-")))
        assert_close(y, case["out"], 1e-5, f"{name} out")
        assert_close(s, case["final_state"], 1e-5, f"{name} final_state")
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("gdn_gates"))
def test_gates(path):
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "A_log"):
        g, beta = gates(case["a"], case["b"], case["A_log"], case["dt_bias"])
        assert_close(g, case["g"], 1e-5, f"{name} g")
        assert_close(beta, case["beta"], 1e-5, f"{name} beta")
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("l2norm"))
def test_l2_norm(path):
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "x"):
        assert_close(l2_norm(case["x"]), case["out"], 1e-5, name)
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("conv1d_silu"))
def test_conv1d_silu(path):
    tensors = Tensors.load(path)
    for kernel, weight in cases(tensors, "weight"):
        w = weight["weight"]
        width = w.shape[1] - 1  # stored states hold one more row than the engine keeps
        for name, case in cases(tensors, "x", within=kernel):
            y, _ = conv1d_silu(case["x"], w, np.zeros_like(case["state_in"][:, -width:]))
            assert_close(y, case["out"], 1e-5, f"{name} out")
            y, tail = conv1d_silu(case["x"], w, case["state_in"][:, -width:])
            assert_close(y, case["out_with_state"], 1e-5, f"{name} out_with_state")
            np.testing.assert_array_equal(tail, case["state_out"][:, -width:], name)
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("norms"))
def test_norms(path):
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "x"):
        if "gate" in case:
            y = gated_rms_norm(case["x"], case["gate"], case["weight"], EPS)
        else:
            y = rms_norm(case["x"], case["weight"], EPS)
        assert_close(y, case["out"], 1e-5, name)
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("mlp"))
def test_mlp(path):
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "x"):
        weights = (case[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert_close(mlp(case["x"], *weights), case["out"], 1e-5, name)
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("mrope"))
def test_mrope(path):
    tensors = Tensors.load(path)
    for size, head in cases(tensors, "inv_freq"):
        section = tuple(head["mrope_section"])
        frequencies = inverse_frequencies(1e7, 2 * len(head["inv_freq"]))
        np.testing.assert_array_equal(frequencies, head["inv_freq"], size)
        for name, case in cases(tensors, "position_ids", within=size):
            cos, sin = rope_tables(case["position_ids"], frequencies, section)
            assert_close(np.concatenate([cos, cos], -1), case["cos"], 1e-6, f"{name} cos")
            assert_close(np.concatenate([sin, sin], -1), case["sin"], 1e-6, f"{name} sin")
            assert_close(rotate(case["q"], cos, sin), case["q_rot"], 1e-6, f"{name} q")
            assert_close(rotate(case["k"], cos, sin), case["k_rot"], 1e-6, f"{name} k")
    tensors.assert_all_used()


@pytest.mark.parametrize("path", files("attention"))
def test_attention(path):
    """A whole attention block, in one call and in the calls the file names."""
    tensors = Tensors.load(path)
    for name, case in cases(tensors, "calls"):
        x, d = case["x"], len(case["q_norm.weight"])
        heads = case["attn_out_before_gate"].shape[1]
        frequencies = inverse_frequencies(1e7, d // 4)
        index = np.arange(len(x))
        cos, sin = rope_tables(np.stack([index] * 3), frequencies, (11, 11, 10))
        q, gate = np.split(linear(x, case["q_proj.weight"]).reshape(-1, heads, 2 * d), 2, -1)
        k = linear(x, case["k_proj.weight"]).reshape(len(x), -1, d)
        v = linear(x, case["v_proj.weight"]).reshape(len(x), -1, d).transpose(1, 0, 2)
        q = rotate(rms_norm(q, case["q_norm.weight"], EPS), cos, sin)
        k = rotate(rms_norm(k, case["k_norm.weight"], EPS), cos, sin).transpose(1, 0, 2)
        assert_close(k, case["cache_key"], 1e-4, f"{name} key")
        assert_close(v, case["cache_value"], 1e-4, f"{name} value")
        ends = np.cumsum(case["calls"])
        assert ends[-1] == len(x)
        for plan in ([len(x)], ends):
            begins = [0, *plan[:-1]]
            parts = zip(begins, plan, strict=True)
            y = np.concatenate([attend(q[a:b], k[:, :b], v[:, :b]) for a, b in parts])
            assert_close(y, case["attn_out_before_gate"], 1e-4, f"{name} {plan}")
            out = linear((y * sigmoid(gate)).reshape(len(x), -1), case["o_proj.weight"])
            assert_close(out, case["out"], 1e-4, f"{name} {plan} out")
    tensors.assert_all_used()


# ------------------------------------------------------------------------------ the models


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    return golden_model(request.param)


@pytest.fixture(scope="module")
def twin(golden):
    return Reference.load(golden.folder)


@pytest.mark.parametrize("chunk", [None, 64])
def test_logits(golden, twin, chunk):
    model = Reference(twin.config, twin.weights, chunk=chunk)
    for name, case in prompts(golden):
        logits = model.logits(case["input_ids"])
        rows = case.get("rows", np.arange(len(logits)))
        assert np.abs(logits[rows] - case["logits"]).max() < 5e-4, name


def test_float64_agrees_with_the_stored_float32(golden, twin):
    model = Reference(twin.config, twin.weights, dtype=np.float64)
    for name, case in prompts(golden):
        if len(case["input_ids"]) > 65:
            continue
        logits = model.logits(case["input_ids"])
        assert np.abs(logits - case["logits"]).max() < 5e-4, name


def test_greedy(golden, twin):
    for name, case in prompts(golden):
        ids = case["greedy_ids"]
        count = len(ids) if len(case["input_ids"]) < 100 else 16
        assert twin.greedy(case["input_ids"], count) == ids[:count].tolist(), name


def test_greedy_logits(golden, twin):
    """The logits each greedy token was chosen from, where they are stored."""
    found = [(name, case) for name, case in prompts(golden) if "greedy_logits" in case]
    assert found
    for name, case in found:
        ids = np.concatenate([case["input_ids"], case["greedy_ids"]])
        logits = twin.logits(ids)[len(case["input_ids"]) - 1 : -1]
        assert np.abs(logits - case["greedy_logits"]).max() < 5e-4, name
        best = np.sort(logits, axis=1)[:, -2:]
        assert np.abs(best[:, 1] - best[:, 0] - case["greedy_margin"]).max() < 1e-3, name


def test_states(golden, twin):
    """The cache after a prompt; the linear layers after its greedy continuation was fed too."""
    states = golden.states
    for name, case in prompts(golden):
        state = twin.start()
        twin.feed(state, case["input_ids"])
        check_state(state, states.under(name))
        twin.feed(state, case["greedy_ids"])
        check_state(state, states.under(f"{name}_after_greedy{len(case['greedy_ids'])}"))
    states.assert_all_used()


def check_state(state, want):
    for key in want:
        part, layer = key.split(".")
        got, expected = state.layers[int(layer)][part], want[key]
        if part == "conv":  # the file holds as many rows as the kernel has taps
            expected = expected[:, -got.shape[1] :]
        assert_close(got, expected, 2e-4, key)


def test_trace(golden, twin):
    want = golden.trace
    ids = want["input_ids"]
    got = twin.trace(ids)
    rows = want.get("rows", np.arange(len(ids)))
    for key in want:
        if key not in ("input_ids", "rows"):
            assert_close(per_token(got[key], ids)[rows], per_token(want[key], rows), 2e-4, key)


def per_token(x, tokens):
    """`gated_norm` has a row per token and head; all others a row per token."""
    return x.reshape(len(tokens), -1)


@pytest.mark.parametrize("chunk", [None, 64])
def test_chunk_plans(golden, twin, chunk):
    """A prompt in pieces: the states at the stored boundaries, and the logits of the whole."""
    model = Reference(twin.config, twin.weights, chunk=chunk)
    plans = golden.chunked
    ids = plans["input_ids"]
    whole = model.logits(ids)
    for name, case in cases(plans, "plan"):
        state, done, logits = model.start(), 0, []
        for count in case["plan"]:
            logits.append(model.head(model.feed(state, ids[done : done + count])))
            done += count
            check_state(state, plans.under(f"{name}.after{done}"))
        assert done == len(ids)
        assert np.abs(np.concatenate(logits) - whole).max() < 5e-4, name
    plans.assert_all_used()


@pytest.mark.parametrize("chunk", [None, 64])
def test_demo(chunk):
    """The trained toy: log-probabilities of its stored continuations."""
    model = Reference.load(DEMO_FOLDER, chunk=chunk)
    for case in json.loads((DEMO / "greedy.json").read_text())["prompts"]:
        begin, tokens = len(case["prompt_tokens"]) - 1, case["tokens"]
        logits = model.logits(case["prompt_tokens"] + tokens)[begin:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        got = logprobs[np.arange(len(tokens)), tokens]
        assert np.abs(got - case["logprobs"]).max() < 2e-4, case["rendered"]


# ------------------------------------------------------------------------- formula weights


def test_formula_model():
    """Values worked out in double precision, stated to nine digits."""
    np.testing.assert_allclose(
        formula(0, (3,), 1), [-0.94170001, 0.93331258, 0.18049334], atol=5e-9
    )
    config, weights = formula_model()
    assert len(weights) == 55
    assert Config.from_dict(config).layer_types.count("full_attention") == 1
    first = [0.480246647, 0.597545328, -0.194677621, 1.528470857, 1.404698295, -0.634155992]
    first += [-0.761219331, 1.720904981, -0.531400601, 2.127396897, -0.887826848, 1.670637657]
    first += [0.441285283, -2.333394658, -2.371930012, -0.822768376]
    last = [0.836006134, -1.779294107, -0.835738592, -1.676904858, 0.035351317, 1.550996099]
    last += [0.213578984, -1.405873532, -1.439815186, -0.821093551, 2.13132304, 0.361098353]
    last += [0.53258708, 0.941601319, -2.458219872, 1.07001039]
    head = [
        [0.04153706, 0.03604044, -0.06925221, 0.00046699],
        [0.01515139, 0.17660661, -0.10168161, 0.0854792],
        [-0.08756016, -0.08988457, -0.09783679, -0.12378667],
        [0.05233093, 0.07325864, -0.00248838, 0.06534646],
    ]
    for dtype, bound in ((np.float64, 2e-7), (np.float32, 5e-5)):
        model = Reference(Config.from_dict(config), weights, dtype)
        state = model.start()
        logits = model.head(model.feed(state, [3, 1, 4, 1, 5, 9, 2, 6]))
        np.testing.assert_allclose(logits[0], first, atol=bound)
        np.testing.assert_allclose(logits[7], last, atol=bound)
        assert logits.argmax(axis=1).tolist() == [9, 11, 10, 14, 11, 4, 7, 10]
        assert abs(logits.sum() - 4.87184284) < 100 * bound
        np.testing.assert_allclose(state.layers[0]["recurrent"][0], head, atol=bound)


def test_delta_rule_by_hand():
    """One head of two dims, three tokens; q and k used as given."""
    q = np.array([[0.6, 0.8], [1, 0], [0, 1]])[:, None]
    k = np.array([[1, 0], [0.6, 0.8], [0.8, -0.6]])[:, None]
    v = np.array([[1, 2], [3, -1], [0.5, 0.25]])[:, None]
    g = np.array([-0.1, -0.5, -0.2])[:, None]
    beta = np.array([0.5, 0.9, 0.25])[:, None]
    s = np.array([[[0.1, -0.2], [0.3, 0.4]]])
    out = [[0.5443061, 0.83525773], [1.77243121, -0.26191959], [1.65400435, -0.70787134]]
    final = [[1.52399832, -0.21513822], [1.65400435, -0.70787134]]
    y, after = delta_rule(q, k, v, g, beta, s)
    np.testing.assert_allclose(y[:, 0], out, atol=5e-9)
    np.testing.assert_allclose(after[0], final, atol=5e-9)
    for chunk in (1, 2, 3, 64):
        chunked, state = delta_rule_chunked(q, k, v, g, beta, s, chunk)
        np.testing.assert_allclose(chunked, y, atol=1e-15)
        np.testing.assert_allclose(state, after, atol=1e-15)


# ------------------------------------------------------------- what files do not say alone


def test_mrope_axes_alternate():
    axes = mrope_axes((11, 11, 10), 32)
    assert [int((axes == axis).sum()) for axis in range(3)] == [11, 11, 10]
    assert axes[:4].tolist() == [0, 1, 2, 0]
    assert axes[29:].tolist() == [2, 0, 1]


def test_known_frequencies():
    f = inverse_frequencies(1e7, 64)
    want = {0: 1, 1: 0.60429639, 2: 0.36517411, 15: 5.232991e-4, 16: 3.1622779e-4, 31: 1.6548171e-7}
    for i, value in want.items():
        assert f[i] == pytest.approx(value, rel=1e-7)


def test_known_frequencies_of_yarn():
    """Values of an independent implementation for the released models and factor 4."""
    yarn = Yarn(4.0, 262144)
    assert yarn_range(1e7, 64, yarn) == (14, 22)
    assert yarn.scale == pytest.approx(1.138629436, abs=1e-9)
    assert Yarn(2.0, 262144).scale == pytest.approx(1.069314718, abs=1e-9)
    f = inverse_frequencies(1e7, 64, yarn)
    want = {
        0: 1, 14: 8.6596434e-4, 15: 4.7423982e-4, 16: 2.5693508e-4, 18: 7.2173876e-5,
        20: 1.8449224e-5, 31: 4.1370427e-8,
    }  # fmt: skip
    for i, value in want.items():
        assert f[i] == pytest.approx(value, rel=1.2e-7)
    c = Config.from_dict(config_json(rope={"rope_type": "yarn", **YARN}, rope_style="rope_scaling"))
    assert c.yarn == yarn
    assert Config.from_dict(config_json(rope=YARN)).yarn is None


def test_the_last_rows_alone():
    """`rows` changes what is computed, not what comes out."""
    for layers in (["full_attention", "linear_attention"], ["linear_attention", "full_attention"]):
        text = {"num_hidden_layers": 2, "layer_types": layers}
        c = Config.from_dict(config_json(text))
        rng = np.random.default_rng(0)
        weights = {n: random_values(n, shape, rng) for n, shape in text_tensors(c).items()}
        model = Reference(c, weights, np.float64)
        whole, part = model.start(), model.start()
        for ids, rows in ((range(50), 1), (range(50, 90), 7)):
            want, got = model.feed(whole, ids), model.feed(part, ids, rows=rows)
            assert got.shape == (rows, c.hidden_size)
            np.testing.assert_allclose(got, want[-rows:], atol=1e-12)
        for a, b in zip(whole.layers, part.layers, strict=True):
            for name in a:
                np.testing.assert_allclose(a[name], b[name], atol=1e-12)


def test_softplus_has_no_overflow():
    x = np.array([-1e4, -20, 0, 19.9, 20.1, 1e4], dtype=np.float32)
    want = [0, 2.0611537e-09, np.log(2), 19.9, 20.1, 1e4]
    np.testing.assert_allclose(softplus(x), want, rtol=1e-6)


SPELLINGS = {
    "nested": {},
    "flat": {"layout": "flat"},
    "rope_scaling": {"rope_style": "rope_scaling"},
    "flat, rope_scaling": {"layout": "flat", "rope_style": "rope_scaling"},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_config_spellings_mean_the_same(spelling):
    want = Config.from_dict(config_json())
    assert Config.from_dict(config_json(**spelling)) == want
    explicit = {"full_attention_interval": None, "layer_types": list(want.layer_types)}
    assert Config.from_dict(config_json(explicit, **spelling)) == want


def test_config_defaults():
    c = Config.from_dict(config_json(rope_style="loose"))
    assert (c.mrope_section, c.rotary_dim, c.rope_theta) == ((11, 11, 10), 8, 1e7)
    listed = ["full_attention", "linear_attention", "linear_attention", "linear_attention"]
    assert Config.from_dict(config_json({"layer_types": listed})).layer_types == tuple(listed)


@pytest.mark.parametrize(
    ("text", "rope"),
    [
        ({"hidden_act": "gelu"}, None),
        ({"attention_bias": True}, None),
        ({"attn_output_gate": False}, None),
        (None, {"rope_type": "linear", "factor": 4.0}),
        (None, {"rope_type": "yarn", "mscale": 1.0}),
    ],
)
def test_config_refuses_another_model(text, rope):
    with pytest.raises(ValueError, match="only"):
        Config.from_dict(config_json(text, rope))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "released"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_written_checkpoints_read_back(tmp_path, dtype, shards):
    make_checkpoint(tmp_path, dtype=dtype, shards=shards, mtp=True, vision=True)
    model = Reference.load(tmp_path)
    exact = Reference.load(make_checkpoint(tmp_path / "exact", dtype="F32"))
    step = {"BF16": 2**-8, "released": 2**-8, "F16": 2**-11, "F32": 0}[dtype]
    for name, w in exact.weights.items():
        assert np.all(np.abs(model.weights[name] - w) <= np.abs(w) * step + 1e-7), name
    assert np.isfinite(model.logits([1, 2, 3])).all()
