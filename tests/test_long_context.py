"""Far positions: a needle in a haystack of 33,000 tokens, the end of the context, and YaRN."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qdelta
from qdelta import ArgumentError, ContextError, FileError, _native
from reference import Config, Reference, State, text_tensors
from tiny import TEXT_PREFIXES, Container, Stored, config_json, make_checkpoint, random_values

# ------------------------------------------------------------------------ needle in a haystack

NEEDLES = (10, 33_000)  # where they lie
CUT, QUESTION = 32_990, 33_100  # between them; behind them
CONTEXT = 1 << 16
# A linear layer, which is cheap at any length, and a full one, of which the twin computes the
# last rows alone.
SHAPE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
}
# Rounding of a cached entry, as part of the largest of its row. With "q8" the query is rounded as a
# key is, and a probability as an entry of a value: 8 times the noise in the cache covers them.
KV_STEPS = {"f32": 2**-24, "f16": 2**-11, "q8": 0.5 / 127}
# Two orders of evaluation in float32 may differ by this in a logit (docs/model.md).
FLOAT32 = 2e-4


def needle_token(place: int, message: int) -> int:
    return 500 + 2 * place + message


def question_token(place: int) -> int:
    return 504 + place


def needle_checkpoint(folder: Path) -> Path:
    """A random model in which a question finds its needle and reads the message.

    Columns 28 and 29 of the embedding mark the needles of the two places, 30 and 31 their
    questions, 27 is the message, and 26 marks the hay. The key of a needle and the query of its
    question have a direction in common; the keys of the hay point elsewhere.
    """
    config = config_json(SHAPE)
    c, rng = Config.from_dict(config), np.random.default_rng(5)
    w = {name: random_values(name, shape, rng) for name, shape in text_tensors(c).items()}

    embed = w["embed_tokens.weight"]
    embed[:, 26:] = [3, 0, 0, 0, 0, 0]
    for place in range(2):
        for message in range(2):
            embed[needle_token(place, message)] = 0
            embed[needle_token(place, message), [27, 28 + place]] = [6 * message - 3, 6]
        embed[question_token(place)] = 0
        embed[question_token(place), 30 + place] = 6
    for name in ("linear_attn.out_proj", "mlp.down_proj"):  # the marks reach the full layer
        w[f"layers.0.{name}.weight"] *= 0.2
    attention = "layers.1.self_attn."
    directions = rng.standard_normal((c.head_dim, 3))
    directions[[0, 1, 2, 4, 5, 6]] = 0  # they turn too fast for a direction to last
    directions = 10 * np.linalg.qr(directions)[0]
    w[attention + "k_proj.weight"][:, [28, 29, 26]] = directions
    w[attention + "q_proj.weight"][: c.head_dim, [30, 31]] = directions[:, :2]
    w[attention + "v_proj.weight"][:, 27] *= 4
    for name in ("q_norm", "k_norm"):  # one key in 33,000 must outweigh the rest
        w[f"{attention}{name}.weight"][:] = 0.8

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {TEXT_PREFIXES[0] + name: Stored.of("F32", values) for name, values in w.items()}
    Container(tensors).write(folder / "model.safetensors")
    return folder


def haystack(*messages: int) -> np.ndarray:
    """Random tokens with the two needles in their places, without a question."""
    ids = np.random.default_rng(0).integers(0, 448, QUESTION, dtype=np.int32)
    for place, message in enumerate(messages):
        ids[NEEDLES[place]] = needle_token(place, message)
    return ids


# Messages of the needles, and whose question comes last.
CASES = {
    "far": ((0, 0), 0),
    "far, other message": ((1, 0), 0),
    "near": ((0, 0), 1),
    "near, other message": ((0, 1), 1),
}


@pytest.fixture(scope="module")
def needle_folder(tmp_path_factory) -> Path:
    return needle_checkpoint(tmp_path_factory.mktemp("needle"))


class Twin:
    """The timelines of the twin before the questions, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.model = Reference.load(folder, np.float64, chunk=64)
        self.before: dict[tuple[int, int], State] = {}
        for messages, _ in CASES.values():
            if messages not in self.before:
                state = self.before[messages] = self.model.start()
                self.model.feed(state, haystack(*messages), rows=1)

    def logits(self, case: str, step: float = 0.0) -> np.ndarray:
        """float64 [vocab]. step: noise in the cache, like rounding, see `KV_STEPS`."""
        messages, place = CASES[case]
        state = self.before[messages].copy()
        rng = np.random.default_rng(1)
        for x in state.layers[1].values():
            x += step * np.abs(x).max(-1, keepdims=True) * rng.uniform(-1, 1, x.shape)
        return self.model.head(self.model.feed(state, [question_token(place)]))[0]


@pytest.fixture(scope="module")
def twin(needle_folder) -> Twin:
    return Twin(needle_folder)


@pytest.mark.parametrize("kv", KV_STEPS)
def test_a_needle_is_found(needle_folder, twin, kv):
    """Prefill and decode far out, what they read from far away, and the cache of all positions."""
    step = KV_STEPS[kv]
    model = _native.Model(_native.Checkpoint(str(needle_folder)), kv=kv, threads=2)
    got, want, bound = {}, {}, {}
    for far_message in (0, 1):
        session = model.session()
        session.feed(haystack(far_message, 0)[:CUT], logits="none")
        snapshot = session.snapshot()
        for case, (messages, place) in CASES.items():
            if messages[0] != far_message:
                continue
            want[case] = twin.logits(case)
            bound[case] = FLOAT32 + 8 * np.abs(twin.logits(case, step) - want[case]).max()
            hay, question = haystack(*messages)[CUT:], [np.int32(question_token(place))]
            for parts in ([np.concatenate([hay, question])], [hay, np.array(question)]):
                session.restore(snapshot)
                for part in parts:
                    session.feed(part)
                got[case] = session.logits()[0]
                off = np.abs(got[case] - want[case]).max()
                assert off <= bound[case], f"{case}: off by {off}, bound {bound[case]}"
            cache = session.state(1)
            for part, exact in twin.before[messages].layers[1].items():
                rounding = step * np.abs(exact).max(-1, keepdims=True) + FLOAT32
                assert np.all(np.abs(cache[part][:, :QUESTION] - exact) <= rounding), part

    for place in ("far", "near"):  # the test would notice a needle that nobody reads
        a, b = place, f"{place}, other message"
        for logits in (got, want):
            assert np.abs(logits[a] - logits[b]).max() > 5 * max(bound[a], bound[b])


# ------------------------------------------------------------------------- end of the context


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A tiny model for 64 positions, without an extension."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), {"max_position_embeddings": 64})


def load(folder: Path, **settings):
    return qdelta.load(folder, quant="none", threads=2, progress=False, **settings)


@pytest.mark.parametrize("settings", [{}, {"ctx": 40}, {"yarn": 2.5}, {"yarn": 2.5, "ctx": 100}])
def test_the_context_is_refused_beyond_its_end_and_unharmed(plain, settings):
    model = load(plain, **settings)
    context = settings.get("ctx", int(64 * settings.get("yarn", 1)))
    assert model.context == context
    ids = np.arange(context) % 400
    session, other = model.session(), model.session()
    for one in (session, other):
        one.feed(ids[:-1])
    for native in (False, True):
        with pytest.raises(ContextError, match=str(context)):
            if native:
                session._native.feed(np.array([1, 2], np.int32))
            else:
                session.feed([1, 2])
        assert session.n_tokens == context - 1
    np.testing.assert_array_equal(session.feed(ids[-1:]), other.feed(ids[-1:]))
    with pytest.raises(ContextError):
        session.feed([1])
    assert session.tokens == ids.tolist()
    for i in range(4):
        for part, x in session._native.state(i).items():
            np.testing.assert_array_equal(x, other._native.state(i)[part])


def test_a_longer_context_needs_yarn(plain):
    with pytest.raises(ArgumentError, match=r"context is 65, expected 1 to 64 .*YaRN"):
        load(plain, ctx=65)
    with pytest.raises(ArgumentError, match="context is 129, expected 1 to 128"):
        load(plain, ctx=129, yarn=2)
    with pytest.raises(ContextError):
        load(plain).logits(range(65))


# ---------------------------------------------------------------------------------------- YaRN

# Of 16 frequencies, the first 9 are kept more or less, the others divided.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "partial_rotary_factor": 1.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_YARN = {**YARN, "rope_type": "default"}
YARN_SHAPE = {"head_dim": 32, "max_position_embeddings": 64}
YARN_STYLES = {
    "plain": {},
    "factor 1.7": {"factor": 1.7},
    "factors": {"attention_factor": 0.9, "beta_fast": 4, "beta_slow": 0.5},
}


@pytest.mark.parametrize("rope_style", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("style", YARN_STYLES)
def test_yarn_is_that_of_the_twin(tmp_path, rope_style, style):
    """On both sides of the original context, in prefill and in decode."""
    rope = {**YARN, **YARN_STYLES[style]}
    folder = make_checkpoint(tmp_path, YARN_SHAPE, rope, rope_style=rope_style)
    end = int(64 * rope["factor"])
    ids = np.random.default_rng(0).integers(0, 448, end)
    want = Reference.load(folder, np.float64).logits(ids)
    rounded = Reference.load(folder, np.float32).logits(ids)
    bound = 20 * np.abs(rounded - want).max() + 1e-5 * np.abs(want).max()
    model = load(folder, kv="f32")
    assert (model.context, model.native.yarn) == (end, rope["factor"])
    session = model.session()
    got = np.concatenate(
        [session.feed(part, logits="all") for part in (ids[:50], ids[50:-9], *ids[-9:, None])]
    )
    assert np.abs(got - want).max() <= bound

    (folder / "config.json").write_text(json.dumps(config_json(YARN_SHAPE, NO_YARN)))
    other = Reference.load(folder, np.float64).logits(ids)
    for part in (slice(1, 64), slice(64, None)):  # it is static: short texts change, too
        assert np.abs(other - want)[part].max() > 100 * bound


def test_yarn_asked_for_is_yarn_of_the_config(tmp_path):
    """The option takes the place of what the config says, whatever that is."""
    ids = np.random.default_rng(0).integers(0, 448, 60)
    logits = {}
    for name, rope in {
        "none": NO_YARN,
        "4": YARN,
        "3": {**YARN, "factor": 3.0, "attention_factor": 1.7},
    }.items():
        folder = make_checkpoint(tmp_path / name, YARN_SHAPE, rope)
        for yarn in (None, 1, 3, 4):
            model = load(folder, yarn=yarn)
            logits[name, yarn] = model.logits(ids)
            in_force = {"none": None, "4": 4, "3": 3}[name] if yarn is None else yarn
            assert model.context == 64 * (in_force or 1)
            assert model.native.yarn == (None if in_force == 1 else in_force)
    for name in ("none", "4", "3"):
        np.testing.assert_array_equal(logits[name, 1], logits["none", None])
        np.testing.assert_array_equal(logits[name, 4], logits["4", None])
        np.testing.assert_array_equal(logits[name, 3], logits["none", 3])
    assert np.any(logits["none", 3] != logits["3", None])
    assert np.any(logits["none", 3] != logits["none", 4])


@pytest.mark.parametrize("yarn", [0, 0.99, -2, float("nan"), float("inf"), 1e6])
def test_bad_factors_are_refused(plain, yarn):
    with pytest.raises(ArgumentError, match=r"yarn is .*, expected a factor from 1 to 32768"):
        load(plain, yarn=yarn)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"factor": None}, "`factor` is missing"),
        ({"factor": 0.5}, "`factor` is 0.5, expected a number from 1"),
        ({"factor": "four"}, '`factor` is "four", expected a positive number'),
        ({"original_max_position_embeddings": None}, "`original_max_position_embeddings` is miss"),
        ({"original_max_position_embeddings": -1}, "`original_max_position_embeddings` is -1"),
        ({"beta_slow": 40}, "`beta_fast` is 32, expected more than `beta_slow`, which is 40"),
        ({"rope_type": "dynamic"}, '`rope_type` is "dynamic", supported are'),
    ],
)
def test_bad_configs_are_refused(tmp_path, rope, words):
    make_checkpoint(tmp_path)
    config = config_json(YARN_SHAPE, {**YARN, **rope})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((FileError, qdelta.UnsupportedError), match=f"config.json: {words}"):
        load(tmp_path)
