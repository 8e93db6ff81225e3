"""Choosing tokens: each rule against a plain float64 twin, and the profiles of the cards."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import qdelta
from qdelta import profiles
from qdelta.sampling import Sampler, Sampling, nucleus, top_k


class Row:
    """A row of logits with the methods of a session; remembers whether it was taken whole."""

    def __init__(self, row):
        self.row = np.asarray(row, np.float32)
        self.whole = 0
        self.fetched = 0

    def logits(self):
        self.whole += 1
        return self.row[None].copy()

    def gather(self, ids):
        return self.row[ids]

    def candidates(self, k, *, limit, ids, values):
        row = self.row[:limit].copy()
        row[ids] = values
        best = np.argsort(-row, kind="stable")[:k]
        self.fetched += len(best)
        return best.astype(np.int32), row[best]


def twin(row, sampling: Sampling, generated: list[int], limit: int) -> np.ndarray:
    """Probability of each token, in float64 and without any shortcut."""
    x = np.asarray(row, np.float64)[:limit].copy()
    for id, bias in sampling.logit_bias.items():
        x[id] += bias
    for id in set(generated):
        r = sampling.repetition_penalty
        x[id] = x[id] / r if x[id] > 0 else x[id] * r
        x[id] -= sampling.presence_penalty + sampling.frequency_penalty * generated.count(id)
    order = np.argsort(-x, kind="stable")
    first = 1.0 if sampling.order == "temperature_last" else sampling.temperature
    kept = order[: sampling.top_k] if sampling.top_k > 0 else order
    p = np.exp((x[kept] - x[kept[0]]) / first)
    p /= p.sum()
    if sampling.top_p < 1:
        n = int(np.searchsorted(p.cumsum(), sampling.top_p)) + 1
        kept, p = kept[:n], p[:n]
    if sampling.min_p > 0:
        kept = kept[p >= sampling.min_p * p[0]]
    p = np.exp((x[kept] - x[kept[0]]) / sampling.temperature)
    result = np.zeros(limit)
    result[kept] = p / p.sum()
    return result


VOCAB, LIMIT = 40, 37

SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 12, "top_p": 0.8, "temperature": 0.7, "order": "temperature_last"},
    {"top_p": 0.8, "temperature": 1.8, "order": "temperature_last"},
    {"top_k": 20, "min_p": 0.1, "temperature": 1.5, "order": "temperature_last"},
    {"top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
    {"top_k": 20, "frequency_penalty": 0.7},
    {"top_p": 0.9, "frequency_penalty": -0.7},
    {"top_k": 20, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"top_k": 10, "logit_bias": {3: 6.0, 36: 8.0}},
    {"top_k": 30, "logit_bias": {3: 4.0, 4: 3.0}, "repetition_penalty": 2.0},
    {"top_k": 30, "logit_bias": {0: -math.inf, 4: 3.0}, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("processed", [False, True])
def test_frequencies(settings, processed):
    """Chi-square of 8,000 draws against the twin, with a fixed history of generated tokens."""
    row = np.random.default_rng(5).normal(0, 2, VOCAB).astype(np.float32)
    row[LIMIT:] = 50.0  # padding, larger than everything
    sampling = Sampling(seed=1, **settings)
    generated = [0, 4, 4, 4, 7, 20]
    sampler = Sampler(
        sampling, limit=LIMIT, processors=[lambda ids, logits: logits] if processed else []
    )
    for id in generated:
        sampler._changed.count(id)
    want = twin(row, sampling, generated if sampler._penalised else [], LIMIT)
    draws = 8_000
    source = Row(row)
    counts = np.zeros(LIMIT)
    sampler._changed.count = lambda id: None  # the history stays as it is
    for _ in range(draws):
        counts[sampler.choose(source)] += 1
    assert not counts[want == 0].any()
    likely = want * draws >= 5
    expected, found = want[likely] * draws, counts[likely]
    degrees = max(1, likely.sum() - 1)
    chi2 = float(((found - expected) ** 2 / expected).sum())
    # Mean `degrees`, variance twice that: six standard deviations, and a bit for few degrees.
    assert chi2 < degrees + 6 * math.sqrt(2 * degrees) + 10, (chi2, degrees)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("top_k")], ids=str)
def test_list_and_row_choose_alike(settings):
    """With and without a processor, which is with and without the whole row in Python."""
    rng = np.random.default_rng(8)
    listed = Sampler(Sampling(seed=3, **settings), limit=LIMIT)
    whole = Sampler(
        Sampling(seed=3, **settings), limit=LIMIT, processors=[lambda ids, logits: logits]
    )
    for _ in range(300):
        row = Row(rng.normal(0, 2, VOCAB))
        assert listed.choose(row) == whole.choose(row)


def test_greedy_takes_the_largest():
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = Row(rng.normal(0, 1, VOCAB))
        assert Sampler(Sampling(temperature=0), limit=LIMIT).choose(row) == row.row[:LIMIT].argmax()
    ties = Row([1, 3, 0, 3])
    for processors in ([], [lambda ids, logits: logits]):
        sampler = Sampler(Sampling(temperature=0.0), limit=4, processors=processors)
        assert sampler.choose(ties) == 1


def test_greedy_obeys_bias_and_penalties():
    row = Row([5.0, 4.0, 3.5])
    assert Sampler(Sampling(temperature=0, logit_bias={2: 2.0}), limit=3).choose(row) == 2
    sampler = Sampler(Sampling(temperature=0, presence_penalty=2.0), limit=3)
    assert [sampler.choose(row) for _ in range(4)] == [0, 1, 2, 0]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), limit=3)
    assert [sampler.choose(row) for _ in range(3)] == [0, 1, 2]


def test_penalties_leave_the_prompt_alone():
    row = Row([5.0, 4.9])
    sampler = Sampler(
        Sampling(temperature=0, presence_penalty=2.0), limit=2, prompt=[0, 0, 0],
        processors=[lambda ids, logits: logits],
    )  # fmt: skip
    assert sampler.choose(row) == 0


def test_seeds():
    rows = [Row(row) for row in np.random.default_rng(2).normal(0, 1, (60, VOCAB))]

    def run(seed):
        sampler = Sampler(Sampling(top_k=10, presence_penalty=1.0, seed=seed), limit=LIMIT)
        return [sampler.choose(row) for row in rows]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)
    assert len({tuple(run(seed)) for seed in range(20)}) == 20


def test_seeded_choices_stay_what_they_are():
    """A seed keeps its meaning from one version to the next."""
    rows = [Row(row) for row in np.random.default_rng(2).normal(0, 2, (12, VOCAB))]
    sampler = Sampler(Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1234), limit=LIMIT)
    assert [sampler.choose(row) for row in rows] == [5, 16, 28, 16, 35, 31, 16, 11, 6, 26, 29, 32]


def test_only_candidates_reach_python():
    row = Row(np.random.default_rng(0).normal(0, 1, 248_320))
    sampler = Sampler(profiles_of(1024, 24)["thinking"].but(seed=1), limit=248_077)
    for _ in range(50):
        sampler.choose(row)
    assert row.whole == 0
    assert row.fetched == 50 * 20


def test_top_k_breaks_ties_by_id():
    row = np.array([1, 3, 2, 3, 2, 2, 0], np.float32)
    assert top_k(row, 4).tolist() == [1, 3, 2, 4]
    assert top_k(row, 1).tolist() == [1]


def sorted_nucleus(weights: np.ndarray, top_p: float, min_p: float) -> list[int]:
    """The twin: sorts everything, and adds whole numbers one by one."""
    order = sorted(range(len(weights)), key=lambda i: -weights[i])  # of equal ones the first first
    if top_p < 1:
        unit = 2.0 ** (62 - len(weights).bit_length())
        shares = [int(float(weights[i]) * unit) for i in order]
        sums = list(itertools.accumulate(shares))
        target = Fraction(top_p) * sums[-1]
        order = order[: 1 + next(n for n, sum in enumerate(sums) if sum >= target)]
    return sorted(i for i in order if weights[i] >= min_p)


ROWS = {
    **{f"normal {s}": lambda rng, s=s: rng.normal(0, s, 3000) for s in (0.01, 1.0, 8.0, 60.0)},
    "all equal": lambda rng: np.full(3000, 7.0),
    "two values": lambda rng: rng.integers(0, 2, 3000),
    "few values": lambda rng: rng.integers(0, 6, 3000) * 2.5,
    "one": lambda rng: np.zeros(1),
    "two": lambda rng: np.array([0.0, 0.0]),
    "most are banned": lambda rng: np.where(rng.random(3000) < 0.9, -np.inf, rng.normal(size=3000)),
    "all but one are banned": lambda rng: np.where(np.arange(3000) == 1234, 0.0, -np.inf),
    "one is far above": lambda rng: np.where(np.arange(3000) == 99, 300.0, rng.normal(size=3000)),
}


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.25, 0.5, 0.9, 0.999999, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 1e-5, 0.1, 1.0])
@pytest.mark.parametrize("row", ROWS)
def test_nucleus_equals_a_full_sort(top_p, min_p, row):
    logits = ROWS[row](np.random.default_rng(4)).astype(np.float32)
    weights = np.exp(logits - logits.max())
    assert nucleus(weights, top_p, min_p).tolist() == sorted_nucleus(weights, top_p, min_p)


def test_nucleus_of_many_rows():
    """Each with ties, a target that some sum may hit, and its own slope."""
    rng = np.random.default_rng(7)
    for _ in range(300):
        logits = np.round(rng.normal(0, rng.uniform(0, 12), rng.integers(1, 400)), 1)
        weights = np.exp((logits - logits.max()).astype(np.float32))
        top_p = float(rng.choice([rng.random(), rng.integers(1, 8) / 8, 1 - rng.random() ** 9]))
        if top_p > 0:
            assert nucleus(weights, top_p, 0.0).tolist() == sorted_nucleus(weights, top_p, 0.0)


def test_nucleus_of_a_vocabulary():
    logits = np.random.default_rng(1).normal(0, 3, 248_320).astype(np.float32)
    weights = np.exp(logits - logits.max())
    for top_p in (0.01, 0.95, 0.9999):
        assert nucleus(weights, top_p, 0.0).tolist() == sorted_nucleus(weights, top_p, 0.0)


@pytest.mark.parametrize("order", ["temperature_first", "temperature_last"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_the_coldest_temperature(settings, order):
    sampling = Sampling(temperature=5e-324, order=order, **settings)
    assert Sampler(sampling, limit=3).choose(Row([1.0, 1.5, 1.4])) == 1


# Processors


def test_processors_see_tokens_and_row():
    seen = []

    def note(ids, row):
        seen.append((ids.dtype, ids.tolist(), row.dtype, row.shape))
        row[:] = -np.inf
        row[len(seen)] = 0
        return row

    sampler = Sampler(Sampling(seed=0), limit=LIMIT, prompt=[9, 8], processors=[note])
    source = Row(np.zeros(VOCAB))
    assert [sampler.choose(source) for _ in range(3)] == [1, 2, 3]
    assert [ids for _, ids, _, _ in seen] == [[9, 8], [9, 8, 1], [9, 8, 1, 2]]
    assert all(rest == (np.int32, np.float32, (VOCAB,)) for a, _, *b in seen for rest in [(a, *b)])
    assert not source.row.any()


def test_processors_run_in_order_and_may_return_new_rows():
    sampler = Sampler(
        Sampling(temperature=0),
        limit=3,
        processors=[lambda ids, row: row + np.array([0, 5, 0]), lambda ids, row: -row],
    )
    assert sampler.choose(Row([1, 0, 2])) == 0


def test_many_tokens_with_a_processor():
    sampler = Sampler(Sampling(seed=0), limit=LIMIT, processors=[lambda ids, row: row])
    source = Row(np.random.default_rng(0).normal(0, 1, VOCAB))
    chosen = [sampler.choose(source) for _ in range(700)]
    assert sampler._tokens[:700].tolist() == chosen


def test_processor_of_the_wrong_shape():
    sampler = Sampler(Sampling(), limit=3, processors=[lambda ids, row: row[:2]])
    with pytest.raises(qdelta.ArgumentError, match="shape"):
        sampler.choose(Row([1, 2, 3]))


# Bad rows and bad values


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"temperature": 0}, {"top_p": 0.5}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(settings, value):
    row = Row([value, value, value, value])
    with pytest.raises(qdelta.Error, match="damaged"):
        Sampler(Sampling(**settings), limit=4).choose(row)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"temperature": 0}, {"min_p": 0.5}])
def test_no_token_left(settings):
    banned = {id: -math.inf for id in range(4)}
    with pytest.raises(qdelta.ArgumentError, match="no token is left"):
        Sampler(Sampling(logit_bias=banned, **settings), limit=4).choose(Row([1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "0 or more expected, got -0.1"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("temperature", "1", "a number expected, got '1'"),
        ("temperature", True, "a number expected"),
        ("top_p", 0.0, "above 0, 1 or less expected, got 0"),
        ("top_p", 1.1, "above 0, 1 or less expected, got 1.1"),
        ("min_p", 1.5, "0 or more, 1 or less"),
        ("min_p", -1, "0 or more, 1 or less"),
        ("presence_penalty", 3, "-2 or more, 2 or less"),
        ("frequency_penalty", -3, "-2 or more, 2 or less"),
        ("repetition_penalty", 0, "above 0 expected"),
        ("top_k", -2, "-1 or more"),
        ("top_k", 2.5, "an integer"),
        ("seed", -1, "an integer of 0 or more"),
        ("seed", 1.0, "an integer"),
        ("order", "first", "temperature_last"),
        ("logit_bias", [1], "a mapping"),
        ("logit_bias", {"x": 1.0}, "token ids"),
        ("logit_bias", {-1: 1.0}, "token ids"),
        ("logit_bias", {1: math.nan}, "a number below infinity"),
        ("logit_bias", {1: math.inf}, "a number below infinity"),
    ],
)
def test_values_out_of_range(name, value, expected):
    with pytest.raises(qdelta.ArgumentError, match=f"^{name}: .*{expected}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "logit_bias", "order"])
def test_errors_are_short(name):
    for value in ("\x1b[2J\n" * 100_000, [1] * 100_000, 10**400, -(10**400), {"x" * 100_000: 1}):
        if (name, value) == ("top_k", 10**400):
            continue
        with pytest.raises(qdelta.ArgumentError) as caught:
            Sampling(**{name: value})
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_bias_beyond_the_vocabulary():
    with pytest.raises(qdelta.ArgumentError, match="token 37, the vocabulary has 37"):
        Sampler(Sampling(logit_bias={37: 1.0}), limit=37)


def test_values_are_levelled():
    sampling = Sampling(temperature=1, top_k=np.int64(5), logit_bias={"12": 1})
    assert (sampling.temperature, sampling.top_k, sampling.logit_bias) == (1.0, 5, {12: 1.0})
    assert Sampling(top_k=-1).top_k == -1
    assert sampling.but(top_k=3) == Sampling(temperature=1.0, top_k=3, logit_bias={12: 1.0})


# Profiles


def profiles_of(hidden_size, num_hidden_layers, generation_config=None):
    text = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    nested = profiles.profiles({"text_config": text}, generation_config or {})
    assert nested == profiles.profiles(text, generation_config or {})
    return nested


@pytest.mark.parametrize(
    ("shape", "name", "temperature", "top_p", "top_k", "presence_penalty"),
    [
        ((1024, 24), "chat", 1.0, 1.0, 20, 2.0),
        ((2048, 24), "vision", 0.7, 0.8, 20, 1.5),
        ((2048, 24), "thinking", 1.0, 0.95, 20, 1.5),
        ((1024, 24), "coding", 0.6, 0.95, 20, 0.0),
        ((1024, 24), "vision-thinking", 0.6, 0.95, 20, 0.0),
        ((2560, 32), "thinking", 1.0, 0.95, 20, 1.5),
        ((2560, 32), "coding", 0.6, 0.95, 20, 0.0),
        ((4096, 32), "chat", 0.7, 0.8, 20, 1.5),
        ((4096, 32), "reasoning", 1.0, 1.0, 40, 2.0),
        ((5120, 64), "chat", 0.7, 0.8, 20, 1.5),
    ],
)
def test_cards(shape, name, temperature, top_p, top_k, presence_penalty):
    assert profiles_of(*shape)[name] == Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, presence_penalty=presence_penalty
    )


def test_generation_config():
    stated = {"temperature": 0.4, "top_k": 7, "top_p": None, "eos_token_id": 5}
    want = Sampling(temperature=0.4, top_k=7)
    assert profiles_of(64, 8, stated) == {
        "chat": want, "thinking": want, "checkpoint": want, "greedy": Sampling(temperature=0.0),
    }  # fmt: skip
    card = profiles_of(2560, 32, stated)
    assert card["checkpoint"] == want
    assert card["chat"] == profiles_of(2560, 32)["chat"]
    assert profiles_of(64, 8, {"do_sample": False})["chat"].temperature == 0.0
    with pytest.raises(qdelta.FileError, match=r"generation_config\.json: top_p"):
        profiles_of(64, 8, {"top_p": 7})


def test_pick():
    found = profiles_of(2560, 32)
    assert profiles.pick(found, "auto", thinking=True) == found["thinking"]
    assert profiles.pick(found, "auto", thinking=False) == found["chat"]
    with pytest.raises(qdelta.ArgumentError, match="did you mean 'thinking'"):
        profiles.pick(found, "thinkin", thinking=False)


def test_stored_generation_config_is_one_of_the_card():
    stored = Path(__file__).parent / "golden" / "tokenizer" / "generation_config.json"
    found = profiles_of(2560, 32, json.loads(stored.read_text()))
    assert found["checkpoint"].but(presence_penalty=1.5) == found["thinking"]
