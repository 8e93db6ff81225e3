"""The screened head: the same candidates, logits and texts as the full one, from fewer bytes.

Screening may miss a candidate by design; on these models, texts and seeds it misses none.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import qdelta
from golden_data import DEMO
from qdelta import _native
from test_cli import run

VALIDATION = (DEMO / "validation.txt").read_text(encoding="utf-8")
NO_IDS = {"ids": np.empty(0, np.int32), "values": np.empty(0, np.float32)}


def load(head: str, quant: str = "w8", isa: str | None = None, threads: int = 2) -> qdelta.Model:
    return qdelta.load(
        "demo", quant=quant, head=head, isa=isa, threads=threads, ctx=1024, progress=False
    )


@pytest.fixture(scope="module", params=["w8", "w4"])
def heads(request) -> tuple[qdelta.Model, qdelta.Model]:
    return load("full", request.param), load("screened", request.param)


def fed(model: qdelta.Model, n: int = 40) -> _native.Session:
    session = model.native.session()
    session.feed(np.array(model.encode(VALIDATION)[:n], np.int32))
    return session


@pytest.mark.parametrize("isa", _native.instruction_sets())
def test_candidates(isa):
    """At each position of a text, for few and for many, as ids below a limit and changed ones."""
    full, screened = (load(head, isa=isa).native.session() for head in ("full", "screened"))
    tokens = np.array(load("full").encode(VALIDATION)[:120], np.int32)
    random = np.random.default_rng(0)
    for token in tokens:
        for session in (full, screened):
            session.feed(np.array([token], np.int32))
        best = full.candidates(4, limit=4096, **NO_IDS)[0]
        ids = np.concatenate([best[1:], random.integers(0, 4096, 20, dtype=np.int32)])
        values = full.gather(ids) - random.random(len(ids), np.float32)
        values[:2] = -np.inf
        np.testing.assert_array_equal(screened.gather(ids), full.gather(ids))
        for k in (1, 5, 20, 300):
            for limit in (4096, 3000):
                for changed in (NO_IDS, {"ids": ids, "values": values}):
                    want = full.candidates(k, limit=limit, **changed)
                    got = screened.candidates(k, limit=limit, **changed)
                    np.testing.assert_array_equal(got[0], want[0])
                    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(screened.logits(), full.logits())


SETTINGS = {
    "greedy": {"temperature": 0},
    "top_k": {"top_k": 20, "top_p": 0.95},
    "penalties": {"top_k": 20, "presence_penalty": 1.5, "frequency_penalty": 0.3},
    "repetition": {"temperature": 0, "repetition_penalty": 1.3},
    "bias": {"top_k": 5, "logit_bias": {300: 6.0, 301: -100.0, 5: float("-inf")}},
    "everything": {"top_k": 0},
    "many": {"top_k": 1000},
    "processor": {"top_k": 20, "processors": lambda ids, row: row - row[7]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_texts(heads, name):
    full, screened = heads
    settings = {"max_tokens": 60, "seed": 3, "ignore_eos": True, **SETTINGS[name]}
    want = full.generate("Once upon a time", **settings)
    got = screened.generate("Once upon a time", **settings)
    assert got.tokens == want.tokens and len(got.tokens) == 60


def test_any_number_of_threads():
    want = fed(load("screened", threads=1)).candidates(20, limit=4096, **NO_IDS)
    for threads in (2, 3, 8):
        got = fed(load("screened", threads=threads)).candidates(20, limit=4096, **NO_IDS)
        np.testing.assert_array_equal(got, want)


def test_logits_are_computed_when_they_are_asked_for(heads):
    full, screened = (fed(model) for model in heads)
    row = full.logits()[-1]
    for _ in range(2):  # before and after the row is there
        np.testing.assert_array_equal(
            screened.gather(np.array([9, 4095, 9], np.int32)), row[[9, 4095, 9]]
        )
        got = screened.candidates(3, limit=4096, **NO_IDS)
        np.testing.assert_array_equal(got[1], np.sort(row)[::-1][:3])
        np.testing.assert_array_equal(screened.logits(), full.logits())
    np.testing.assert_array_equal(heads[1].logits([5, 6, 7]), heads[0].logits([5, 6, 7]))
    text = VALIDATION[:2000]
    for method in ("perplexity", "score"):
        args = (text,) if method == "perplexity" else (text[:500], text[500:600])
        assert getattr(heads[1], method)(*args).usage == getattr(heads[0], method)(*args).usage
    assert heads[1].perplexity(text).mean_loss == heads[0].perplexity(text).mean_loss


def test_a_row_ends_with_its_state():
    """After `reset`, `restore` and a feed without logits there is none."""
    session = fed(load("screened"))
    snapshot = session.snapshot()
    for end in (
        session.reset,
        lambda: session.restore(snapshot),
        lambda: session.feed(np.array([5], np.int32), "none"),
        lambda: session.feed(np.empty(0, np.int32)),
    ):
        session.feed(np.array([5], np.int32))
        end()
        for ask in (
            lambda: session.candidates(1, limit=9, **NO_IDS),
            lambda: session.gather(np.array([1], np.int32)),
        ):
            with pytest.raises(qdelta.ArgumentError, match="no logits"):
                ask()
        assert session.logits().shape == (0, 4096)
    session.feed(np.array([5], np.int32))
    with pytest.raises(qdelta.ArgumentError, match="token id 4096, expected 0 to 4095"):
        session.candidates(
            1, limit=9, ids=np.array([4096], np.int32), values=np.zeros(1, np.float32)
        )


def test_where_it_applies():
    assert load("screened").native.head == "screened"
    assert load("full").native.head == "full"
    unquantised = load("screened", quant="none")
    assert unquantised.native.head == "full"
    with pytest.raises(qdelta.ArgumentError, match="quantised weights expected"):
        unquantised.screening("some text")
    with pytest.raises(qdelta.ArgumentError, match="head is `fast`, expected one of"):
        load("fast")
    session = fed(load("screened"))
    with pytest.raises(qdelta.ArgumentError, match="kept all logits"):
        session.screening(5, limit=4096)


def test_screening(heads):
    """The report, and that it counts what it says."""
    model = heads[1]
    report = model.screening(VALIDATION[:6000], k=5, window=100)
    assert report.k == 5 and report.positions == len(model.encode(VALIDATION[:6000]))
    assert report.missed == report.missed_positions == 0
    assert report.full_positions < report.positions / 10
    assert 5 / 4096 <= report.scored <= report.most_scored < 0.2
    session = model.native.session()
    session.feed(np.array(model.encode(VALIDATION)[:30], np.int32), "all")
    rows = session.screening(5, limit=4096)
    assert len(rows) == 30 and all(5 <= scored <= 4096 and missed == 0 for scored, missed in rows)
    for wrong in ({"k": 0}, {"k": True}, {"window": 1}):
        with pytest.raises(qdelta.ArgumentError):
            model.screening("some text", **wrong)


def test_eval(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(VALIDATION[:4000], encoding="utf-8")
    options = ("eval", "demo", "--text", path, "--quant", "w8", "--window", 64)
    plain = json.loads(run(*options, "--json").stdout)
    report = json.loads(run(*options, "--head", "screened", "--json").stdout)
    assert plain.pop("screening") is None
    screening = report.pop("screening")
    assert screening["k"] == 20 and screening["missed"] == 0 and screening["positions"] > 500
    assert report["mean_loss"] == plain["mean_loss"]
    assert "screened head: 0 of " in run(*options, "--head", "screened").stdout
    assert (
        "quantised weights"
        in run("eval", "demo", "--text", path, "--head", "screened", status=1).stderr
    )
