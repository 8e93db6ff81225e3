"""The engine against stored values, with weights as stored and f32 activations and cache.

Three tiny models under tests/golden/tiny-text; every instruction set this machine has. Values
that are not stored, states between two boundaries for one, come from the numpy twin, which is
held to the same files in tests/test_reference.py.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import qdelta
from golden_data import MODELS, GoldenModel, assert_close, cases, golden_model, prompts
from qdelta import _native
from reference import Reference, State

ISAS = _native.instruction_sets()
THREADS = (1, 2, 3, 8)
LOGITS = 1e-3  # absolute; two float32 orders of evaluation differ by up to 2e-4
STATES = 1e-3  # of the largest entry
# In the files, not in the engine's trace: the rotation shows in q_rope and k_rope.
NOT_TRACED = ("input_ids", "rows", "logits", "rope_cos", "rope_sin")

every_isa = pytest.mark.parametrize("isa", ISAS)
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def golden(name: str) -> GoldenModel:
    return golden_model(name)


@functools.cache
def twin(name: str) -> Reference:
    return Reference.load(golden(name).folder)


@functools.lru_cache(maxsize=8)
def load(name: str, isa: str, threads: int = 2, kv: str = "f32"):
    return qdelta.load(
        golden(name).folder, quant="none", kv=kv, isa=isa, threads=threads, progress=False
    )


def ids(array) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.int32)


def feed_all(session, tokens) -> np.ndarray:
    """Logits of every token of one feed."""
    session.feed(ids(tokens), logits="all")
    return session.logits()


def assert_logits(got: np.ndarray, case, what: str) -> None:
    rows = case.get("rows", np.arange(len(got)))
    assert got.dtype == np.float32
    assert got.shape == (len(case["input_ids"]), case["logits"].shape[1]), what
    error = np.abs(got[rows] - case["logits"]).max()
    assert error < LOGITS, f"{what}: off by {error}"


def assert_state(session, state: State, relative: float, what: str) -> None:
    """Every layer of a session against a state of the twin."""
    for i, layer in enumerate(state.layers):
        got = session.state(i)
        assert set(got) == set(layer), what
        for part, want in layer.items():
            assert_close(got[part], want, relative, f"{what} {part}.{i}")


def assert_stored_state(session, stored, what: str) -> None:
    """Against values named `part.layer`, conv with as many rows as the kernel has taps."""
    for key in stored:
        part, layer = key.split(".")
        got, want = session.state(int(layer))[part], stored[key]
        if part == "conv":
            want = want[:, -got.shape[1] :]
        assert_close(got, want, STATES, f"{what} {key}")


# --------------------------------------------------------------------------- whole prompts


@every_isa
@every_model
def test_logits_of_every_prompt(name, isa):
    model = load(name, isa)
    for prompt, case in prompts(golden(name)):
        assert_logits(model.logits(case["input_ids"].tolist()), case, prompt)


@every_isa
@every_model
def test_threads_change_no_bit(name, isa):
    """Prefill of all rows and decode, for every thread count."""
    found = list(prompts(golden(name)))
    for prompt, case in found if name == MODELS[0] else found[-2:]:
        want = None
        for threads in THREADS:
            session = load(name, isa, threads).native.session()
            got = [feed_all(session, case["input_ids"])]
            for token in case["greedy_ids"][:6]:
                session.feed(ids([token]))
                got.append(session.logits())
            got = np.concatenate(got)
            want = got if want is None else want
            np.testing.assert_array_equal(got, want, f"{prompt}, {threads} threads")
        assert_logits(got[: len(case["input_ids"])], case, prompt)


@every_isa
@every_model
def test_greedy(name, isa):
    model = load(name, isa)
    for prompt, case in prompts(golden(name)):
        session = model.session()
        row = session.feed(case["input_ids"].tolist())
        for i, token in enumerate(case["greedy_ids"].tolist()):
            assert row.shape == (case["logits"].shape[1],)
            if "greedy_logits" in case:
                assert np.abs(row - case["greedy_logits"][i]).max() < LOGITS, (prompt, i)
            assert int(np.argmax(row)) == token, (prompt, i)
            row = session.feed([token])


# -------------------------------------------------------------- inside: states, trace, plans


@every_isa
@every_model
def test_states(name, isa):
    """After a prompt, and after its greedy continuation, in one feed and token by token."""
    states, native = golden(name).states, load(name, isa).native
    for prompt, case in prompts(golden(name)):
        session, state = native.session(), twin(name).start()
        session.feed(ids(case["input_ids"]))
        twin(name).feed(state, case["input_ids"])
        assert_stored_state(session, states.under(prompt), prompt)
        assert_state(session, state, STATES, prompt)
        snapshot = session.snapshot()
        after = states.under(f"{prompt}_after_greedy{len(case['greedy_ids'])}")
        session.feed(ids(case["greedy_ids"]))
        assert_stored_state(session, after, f"{prompt} and greedy")
        session.restore(snapshot)
        for token in case["greedy_ids"]:
            session.feed(ids([token]), logits="none")
        assert_stored_state(session, after, f"{prompt} and greedy, one by one")


@every_isa
@every_model
def test_trace(name, isa):
    """Each step of each layer."""
    want = golden(name).trace
    tokens = want["input_ids"]
    rows = want.get("rows", np.arange(len(tokens)))
    session = load(name, isa).native.session()
    got = session.trace(ids(tokens))
    assert session.n_tokens == len(tokens)
    for key in want:
        if key not in NOT_TRACED:
            ours = got[key].reshape(len(tokens), -1)[rows]
            assert_close(ours, want[key].reshape(len(rows), -1), STATES, key)


@every_isa
@every_model
def test_trace_of_a_continuation(name, isa):
    """Every layer, with a state that is not empty, against the twin."""
    tokens = golden(name).trace["input_ids"]
    tokens = np.concatenate([tokens, tokens[::-1]])
    for begin in (1, len(tokens) // 2):
        state = twin(name).start()
        twin(name).feed(state, tokens[:begin])
        want = twin(name).trace(tokens[begin:], state)
        session = load(name, isa).native.session()
        session.feed(ids(tokens[:begin]), logits="none")
        got = session.trace(ids(tokens[begin:]))
        for key, value in want.items():
            if key not in NOT_TRACED:
                flat = value.reshape(len(tokens) - begin, -1)
                assert_close(got[key].reshape(flat.shape), flat, STATES, key)


@every_isa
@every_model
def test_chunk_plans(name, isa):
    """A prompt in pieces: the state at each boundary, the logits of all pieces."""
    plans = golden(name).chunked
    tokens = plans["input_ids"]
    (whole,) = (
        case for _, case in prompts(golden(name)) if np.array_equal(case["input_ids"], tokens)
    )
    states, state = {}, twin(name).start()
    boundaries = {0} | {int(n) for _, case in cases(plans, "plan") for n in np.cumsum(case["plan"])}
    for begin, end in zip(sorted(boundaries)[:-1], sorted(boundaries)[1:], strict=True):
        twin(name).feed(state, tokens[begin:end])
        states[end] = state.copy()
    for plan, case in cases(plans, "plan"):
        session, done, logits = load(name, isa).native.session(), 0, []
        for count in case["plan"].tolist():
            logits.append(feed_all(session, tokens[done : done + count]))
            done += count
            assert_state(session, states[done], STATES, f"plan {plan} after {done}")
            assert_stored_state(session, plans.under(f"{plan}.after{done}"), plan)
        assert_logits(np.concatenate(logits), whole, plan)


@pytest.mark.parametrize("threads", THREADS)
@every_isa
def test_any_split(isa, threads):
    """A prompt cut at random, with pieces of one among them."""
    rng = np.random.default_rng(threads)
    for name in MODELS:
        prompt, case = max(prompts(golden(name)), key=lambda found: len(found[1]["input_ids"]))
        tokens = case["input_ids"]
        for pieces in (2, 5, 40):
            cuts = np.sort(rng.choice(np.arange(1, len(tokens)), pieces - 1, replace=False))
            session = load(name, isa, threads).native.session()
            logits = [feed_all(session, part) for part in np.split(tokens, cuts)]
            assert_logits(np.concatenate(logits), case, f"{name} {prompt} cut at {cuts}")


# ---------------------------------------------------------------------------- half precision


@every_isa
@every_model
def test_f16_cache(name, isa):
    """Keys and values rounded to 11 bits move a logit by some hundredths at the most."""
    for prompt, case in prompts(golden(name)):
        logits = load(name, isa, kv="f16").logits(case["input_ids"].tolist())
        rows = case.get("rows", np.arange(len(logits)))
        error = np.abs(logits[rows] - case["logits"])
        assert error.max() < 0.1, prompt
        assert error.mean() < 0.01, prompt
