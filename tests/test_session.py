"""Laws of a session: one timeline of tokens, whatever it is fed in."""

from __future__ import annotations

import numpy as np
import pytest

import qdelta
from golden_data import TEXT
from qdelta import _native
from tiny import make_checkpoint

ISAS = _native.instruction_sets()


@pytest.fixture(scope="module", params=[*ISAS, "q8"])
def model(request):
    """On every instruction set, and on the best with each kind of KV cache."""
    options = {"kv": "q8"} if request.param == "q8" else {"isa": request.param}
    return qdelta.load(TEXT / "tiny-f32", quant="none", threads=2, progress=False, **options)


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 448, count, dtype=np.int32)


def everything(session) -> list[np.ndarray]:
    """All a session remembers, and its last logits."""
    layers = [session.state(i) for i in range(8)]
    return [session.tokens(), session.logits(), *(x for s in layers for x in s.values())]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("cut", [0, 1, 3, 63, 64, 65, 255, 256, 257])
def test_restore_is_exact(model, cut):
    """Back at a snapshot, the same tokens give the same bits, in prefill and in decode."""
    before, after = random_tokens(cut), random_tokens(70, seed=1)
    session = model.native.session()
    if cut:
        session.feed(before)
    snapshot = session.snapshot()
    assert snapshot.n_tokens == cut
    assert snapshot.nbytes > 0
    runs = []
    for _ in range(2):
        for part in (after[:64], *after[64:, None]):
            session.feed(part, logits="all")
        runs.append(everything(session))
        session.restore(snapshot)
        assert session.n_tokens == cut
        np.testing.assert_array_equal(session.tokens(), before)
    assert_same(*runs)

    other = model.native.session()  # a snapshot fits every session of its model
    other.feed(random_tokens(300, seed=2))
    other.restore(snapshot)
    for part in (after[:64], *after[64:, None]):
        other.feed(part, logits="all")
    assert_same(everything(other), runs[0])


def test_snapshots_do_not_move(model):
    """Going on, twice and differently, leaves a snapshot as it was."""
    session = model.native.session()
    session.feed(random_tokens(100))
    snapshot, want = session.snapshot(), everything(session)
    for seed in (1, 2):
        session.feed(random_tokens(300, seed))
        session.restore(snapshot)
    probe = random_tokens(9, seed=3)
    session.feed(probe)
    again = model.native.session()
    again.feed(random_tokens(100))
    assert_same(everything(again), want)
    again.feed(probe)
    assert_same(everything(session), everything(again))


def test_snapshot_outlives_session(model):
    session = model.native.session()
    session.feed(random_tokens(50))
    snapshot = session.snapshot()
    session.feed(random_tokens(5, seed=1))
    want = session.logits()
    del session
    other = model.native.session()
    other.restore(snapshot)
    other.feed(random_tokens(5, seed=1))
    np.testing.assert_array_equal(other.logits(), want)


def test_snapshot_of_another_model_is_refused(model, tmp_path):
    other = qdelta.load(make_checkpoint(tmp_path / "other"), quant="none", progress=False)
    stranger = other.native.session()
    stranger.feed(random_tokens(3))
    session = model.native.session()
    with pytest.raises(qdelta.Error):
        session.restore(stranger.snapshot())
    session.feed(random_tokens(3))


def test_reset_is_a_fresh_start(model):
    session, fresh = model.native.session(), model.native.session()
    session.feed(random_tokens(80))
    session.reset()
    assert session.n_tokens == 0
    for s in (session, fresh):
        s.feed(random_tokens(20, seed=1))
    assert_same(everything(session), everything(fresh))


def test_rows_kept(model):
    """`logits` chooses which rows go through the head, and changes none of them."""
    tokens = random_tokens(33)
    sessions = {rows: model.native.session() for rows in ("none", "last", "all")}
    for rows, session in sessions.items():
        session.feed(tokens, logits=rows)
    every = sessions["all"].logits()
    assert every.shape == (33, 512)
    np.testing.assert_array_equal(sessions["last"].logits(), every[-1:])
    assert sessions["none"].logits().shape == (0, 512)
    for session in sessions.values():
        session.feed(tokens[:1])
    np.testing.assert_array_equal(sessions["none"].logits(), sessions["last"].logits())


@pytest.mark.parametrize("count", [1, 2, 5, 64, 300])
def test_outputs_that_nobody_reads_leave_the_same_state(model, count):
    tokens = random_tokens(count)
    sessions = {rows: model.native.session() for rows in ("all", "last", "none")}
    for rows, session in sessions.items():
        session.feed(tokens, logits=rows)
    want = everything(sessions["all"])
    for rows in ("last", "none"):
        found = everything(sessions[rows])
        assert_same(found[2:], want[2:])
    np.testing.assert_allclose(
        sessions["last"].logits()[0], sessions["all"].logits()[-1], rtol=0, atol=1e-4
    )
    assert sessions["none"].logits().shape[0] == 0


def test_logits_are_a_copy(model):
    session = model.native.session()
    session.feed(random_tokens(4))
    kept = session.logits()
    before = kept.copy()
    session.feed(random_tokens(4, seed=1))
    np.testing.assert_array_equal(kept, before)
    session.logits()[:] = 0
    assert session.logits().any()


def test_gather(model):
    session = model.native.session()
    session.feed(random_tokens(7))
    row = session.logits()[-1]
    wanted = np.array([511, 0, 17, 17], dtype=np.int32)
    np.testing.assert_array_equal(session.gather(wanted), row[wanted])
    assert session.gather(wanted[:0]).shape == (0,)
    for bad in (-1, 512):
        with pytest.raises(qdelta.ArgumentError):
            session.gather(np.array([bad], dtype=np.int32))


@pytest.mark.parametrize("k", [1, 2, 20, 40, 333, 512, 5000])
@pytest.mark.parametrize("limit", [512, 448, 1])
def test_candidates(model, k, limit):
    """The k best below `limit`, some entries replaced, against a full sort."""
    session = model.native.session()
    session.feed(random_tokens(11))
    row = session.logits()[-1].copy()
    ids = np.array([int(row.argmax()), 3, 440, 500], dtype=np.int32)
    values = np.array([-5, row.max() + 1, 0.5, 100], dtype=np.float32)
    none = np.array([], dtype=np.int32), np.array([], dtype=np.float32)
    for replaced in (none, (ids, values)):
        changed = row.copy()
        changed[replaced[0]] = replaced[1]
        order = np.lexsort((np.arange(limit), -changed[:limit]))[:k]
        got, scores = session.candidates(k, limit=limit, ids=replaced[0], values=replaced[1])
        np.testing.assert_array_equal(got, order)
        np.testing.assert_array_equal(scores, changed[order])
    np.testing.assert_array_equal(session.logits()[-1], row)


def test_candidates_break_ties_by_id(model):
    session = model.native.session()
    session.feed(random_tokens(2))
    ids = np.arange(512, dtype=np.int32)
    values = np.zeros(512, dtype=np.float32)
    got, _ = session.candidates(5, limit=512, ids=ids, values=values)
    assert got.tolist() == [0, 1, 2, 3, 4]


def test_context_is_a_bound():
    """A feed that does not fit says what it needs and leaves all as it was."""
    model = qdelta.load(TEXT / "tiny-f32", quant="none", ctx=40, progress=False)
    session = model.native.session()
    session.feed(random_tokens(30))
    before = everything(session)
    with pytest.raises(qdelta.ContextError) as caught:
        session.feed(random_tokens(11, seed=1))
    assert (caught.value.needed, caught.value.available) == (41, 40)
    assert "41" in str(caught.value)
    assert_same(everything(session), before)
    session.feed(random_tokens(10, seed=1))
    assert session.n_tokens == 40
    with pytest.raises(qdelta.ContextError):
        session.feed(random_tokens(1))


@pytest.mark.parametrize("bad", [-1, 512, 2**31 - 1, -(2**31)])
def test_ids_outside_the_vocabulary(model, bad):
    session = model.native.session()
    session.feed(random_tokens(5))
    before = everything(session)
    with pytest.raises(qdelta.ArgumentError, match=str(bad)):
        session.feed(np.array([1, bad, 2], dtype=np.int32))
    assert_same(everything(session), before)


@pytest.mark.parametrize("rows", ["", "first", "ALL"])
def test_unknown_choice_of_rows(model, rows):
    with pytest.raises(qdelta.ArgumentError):
        model.native.session().feed(random_tokens(2), logits=rows)


@pytest.mark.parametrize("options", [{"threads": 0}, {"isa": "z80"}, {"kv": "f8"}, {"ctx": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        qdelta.load(TEXT / "tiny-f32", quant="none", progress=False, **options)
