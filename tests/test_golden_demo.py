"""The trained toy: its greedy continuations, and what quantisation costs in perplexity."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

import qdelta
from golden_data import DEMO
from qdelta import _native

PROMPTS = json.loads((DEMO / "greedy.json").read_text())["prompts"]
PERPLEXITY = json.loads((DEMO / "perplexity.json").read_text())
ROUNDING = 1e-3  # two orders of float32 evaluation may choose differently below this margin


@functools.cache
def load(quant: str, isa: str | None = None, kv: str = "f32"):
    return qdelta.load("demo", quant=quant, kv=kv, isa=isa, threads=2, progress=False)


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["rendered"][-40:])
def test_greedy_continuation(case, isa):
    """Token by token; the stored choice is fed whatever rounding may have preferred."""
    session = load("none", isa).session()
    row = session.feed(case["prompt_tokens"])
    for i, token in enumerate(case["tokens"]):
        scores = row.astype(np.float64) - row.max()
        logprobs = scores - np.log(np.exp(scores).sum())
        assert abs(logprobs[token] - case["logprobs"][i]) < 1e-3, i
        best = np.sort(logprobs)[-2:]
        if case["margins"][i] > ROUNDING:
            assert int(np.argmax(row)) == token, i
            assert abs(best[1] - best[0] - case["margins"][i]) < 2e-3, i
        row = session.feed([token])


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["rendered"][-40:])
def test_prompt_is_rendered_as_stored(case):
    model = load("none")
    if "messages" in case:
        options = {k: case[k] for k in ("enable_thinking",) if k in case}
        assert (
            model.render(case["messages"], add_generation_prompt=True, **options)
            == case["rendered"]
        )
    assert list(model.encode(case["rendered"])) == case["prompt_tokens"]


@pytest.mark.parametrize("case", PROMPTS[:5], ids=lambda case: case["rendered"][-40:])
def test_generate_gives_the_stored_text(case):
    """Up to the first choice that rounding could turn."""
    narrow = [i for i, margin in enumerate(case["margins"]) if margin <= ROUNDING]
    count = min([*narrow, len(case["tokens"]), case["stop_at"] or len(case["tokens"])])
    done = load("none").generate(case["prompt"], max_tokens=count, temperature=0)
    assert list(done.tokens) == case["tokens"][:count]
    assert case["text"].startswith(done.text)


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of each row, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def perplexity(model) -> dict[str, float]:
    """As tests/golden/tiny-model-reference/perplexity.json defines it."""
    tokens = np.load(DEMO / "validation-tokens.npy").astype(np.int64)
    window = PERPLEXITY["window"]
    losses = []
    for begin in range(0, len(tokens) - window + 1, window):
        part = tokens[begin : begin + window]
        losses.append(-logprobs(model.logits(part.tolist()))[np.arange(window - 1), part[1:]])
    losses = np.array(losses)
    assert losses.size == PERPLEXITY["float32"]["scored"]
    return {
        "all": float(np.exp(losses.mean())),
        "second_half": float(np.exp(losses[:, window // 2 - 1 :].mean())),
    }


@pytest.mark.parametrize(("quant", "allowed"), [("none", 2e-5), ("w8", 0.005), ("w4", 0.06)])
def test_perplexity(quant, allowed, record_property):
    got = perplexity(load(quant))
    for part, value in got.items():
        want = PERPLEXITY["float32"][part]
        record_property(f"{quant} {part}", value)
        print(f"{quant} {part}: {value:.4f}, {100 * (value / want - 1):+.3f} %")
        assert abs(value / want - 1) < allowed, (part, value, want)


def test_q8_cache():
    """What a KV cache of bytes costs: perplexity, and divergence from the one in f32."""
    tokens = np.load(DEMO / "validation-tokens.npy").astype(np.int64)
    window = PERPLEXITY["window"]
    losses, divergences = [], []
    for begin in range(0, len(tokens) - window + 1, window):
        part = tokens[begin : begin + window].tolist()
        exact, q8 = (logprobs(load("none", kv=kv).logits(part)) for kv in ("f32", "q8"))
        divergences.append((np.exp(exact) * (exact - q8)).sum(axis=1))
        losses.append((exact - q8)[np.arange(window - 1), part[1:]])
    assert 0 < np.mean(divergences) < 1e-3
    assert abs(np.expm1(np.mean(losses))) < 1e-3


def test_public_perplexity():
    """`perplexity` of the file's text: the definition and the value of the stored one."""
    text = (DEMO / "validation.txt").read_text(encoding="utf-8")
    model, want = load("none"), PERPLEXITY["float32"]
    assert list(model.encode(text)) == np.load(DEMO / "validation-tokens.npy").tolist()
    got = model.perplexity(text, window=PERPLEXITY["window"])
    assert (got.windows, got.scored) == (want["windows"], want["scored"])
    assert got.perplexity == pytest.approx(want["all"], rel=2e-5)
    assert got.second_half == pytest.approx(want["second_half"], rel=2e-5)
    assert got.mean_loss == pytest.approx(want["mean_nll"], rel=2e-5)
