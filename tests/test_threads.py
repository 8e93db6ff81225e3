"""Many Python threads, one model: each session is its own timeline, and others run meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import qdelta
from qdelta import _native
from qdelta.source import locate


@pytest.fixture(scope="module")
def model():
    return qdelta.load("demo", quant="w8", threads=2, progress=False)


def prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, 40 + seed, dtype=np.int32)


def timeline(model, seed: int, steps: int = 20) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and last logits after a prompt of its own."""
    session = model.native.session()
    session.feed(prompt(seed))
    chosen = []
    for _ in range(steps):
        chosen.append(int(np.argmax(session.logits()[-1])))
        session.feed(np.array(chosen[-1:], np.int32))
    return chosen, session.logits()


def test_sessions_do_not_meet(model):
    """Eight threads at once give what they give one after another, to the bit."""
    alone = [timeline(model, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: timeline(model, seed), range(8)))
    for (tokens, logits), (want_tokens, want_logits) in zip(together, alone, strict=True):
        assert tokens == want_tokens
        np.testing.assert_array_equal(logits, want_logits)


def test_one_session_from_many_threads():
    """Feeds of one session line up; none is lost and nothing breaks."""
    model = qdelta.load("demo", quant="none", kv="f32", threads=2, progress=False)
    session = model.native.session()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: session.feed(prompt(0)[: i + 1]), range(10)))
    assert session.n_tokens == sum(range(1, 11))
    assert len(session.tokens()) == session.n_tokens
    again = model.native.session()
    again.feed(session.tokens())
    assert np.abs(again.logits()[-1] - session.logits()[-1]).max() < 1e-3


def test_other_python_threads_run_meanwhile(model):
    """While a long feed works, a counting thread gets on."""
    session = model.native.session()
    tokens = np.random.default_rng(0).integers(0, 4000, 2000, dtype=np.int32)
    counted, stop = [], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        while not counted:
            time.sleep(0.001)
        begin = time.perf_counter()
        session.feed(tokens)
        end = time.perf_counter()
    finally:
        stop.set()
        counter.join()
    during = [t for t in counted if begin < t < end]
    assert end - begin < 0.02 or len(during) >= 5, (end - begin, len(during))


def test_models_come_and_go(model):
    """Sessions and snapshots keep what they need; threads end with their model."""
    before = threading.active_count()
    for _ in range(5):
        other = qdelta.load("demo", quant="w8", threads=3, progress=False)
        session = other.native.session()
        session.feed(prompt(1))
        snapshot = session.snapshot()
        want = session.logits()
        del other, session
        assert snapshot.n_tokens == len(prompt(1))
    assert threading.active_count() == before
    fresh = model.native.session()
    fresh.feed(prompt(1))
    np.testing.assert_array_equal(fresh.logits(), want)


def default_threads(change: str = "", omp: str = "") -> int:
    """Threads of a model in a process of its own that runs `change` first."""
    code = f"""if True:
        import os
        import qdelta
        {change or "pass"}
        print(qdelta.load("demo", quant="none", progress=False).native.threads)"""
    environment = {**os.environ, "OMP_NUM_THREADS": omp}
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_default_threads_stay_inside_the_affinity_mask():
    usable = sorted(os.sched_getaffinity(0))
    for count in {1, len(usable)}:
        threads = default_threads(f"os.sched_setaffinity(0, {usable[:count]})")
        assert 1 <= threads <= count


def test_default_threads_and_omp_num_threads():
    """A positive number, or the first of a list, is a limit; anything else is nothing."""
    machine = default_threads()
    assert 1 <= machine <= (os.cpu_count() or 1)
    assert default_threads(omp="1") == default_threads(omp="1,8") == 1
    for omp in ("1000000", "0", "-1", "many"):
        assert default_threads(omp=omp) == machine, omp


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("work", ["convert", "export_gguf"])
def test_conversions_have_the_threads_of_models(work):
    """One by OMP_NUM_THREADS here, or as many as are given."""
    how = "None, quant='w8', attachments=[]"
    if work == "export_gguf":
        how = "out, dtype='F32', metadata=[]"
    code = f"""if True:
        import os, tempfile
        from qdelta import _native
        from qdelta.source import locate
        checkpoint = _native.Checkpoint(str(locate("demo")))
        tasks = lambda: len(os.listdir("/proc/self/task"))
        for threads in (None, 3):
            before, seen = tasks(), []
            progress = lambda done, total: seen.append(tasks() - before)
            with tempfile.TemporaryDirectory() as folder:
                out = folder + "/out.gguf"
                _native.{work}(checkpoint, {how}, threads=threads, progress=progress)
            print(max(seen))"""
    command, environment = [sys.executable, "-c", code], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert done.stdout.split() == [b"1", b"3"]


@pytest.mark.parametrize("threads", [0, 1025, 2**60])
def test_conversions_refuse_other_numbers_of_threads(threads, tmp_path):
    checkpoint = _native.Checkpoint(str(locate("demo")))
    with pytest.raises(qdelta.ArgumentError, match="expected 1 to 1024"):
        _native.convert(checkpoint, None, quant="w8", attachments=[], threads=threads)
    with pytest.raises(qdelta.ArgumentError, match="expected 1 to 1024"):
        out = str(tmp_path / "out.gguf")
        _native.export_gguf(checkpoint, out, dtype="F32", metadata=[], threads=threads)


def test_threads_given_are_threads_had(monkeypatch):
    """Neither the machine nor the environment limits a number that was given."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert qdelta.load("demo", quant="none", threads=9, progress=False).native.threads == 9
    for threads in (1025, 10**9):
        with pytest.raises(qdelta.ArgumentError, match=f"threads is {threads}, expected 1 to 1024"):
            qdelta.load("demo", quant="none", threads=threads, progress=False)


def test_nothing_spins_between_calls(model):
    """An idle pool takes no CPU time. Spinning threads would take at least the time slept."""
    session = model.native.session()
    session.feed(prompt(0))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to become a user"
)
def test_threads_that_the_system_refuses():
    """The shares of threads that could not start are done by the others."""
    code = """if True:
        import os, resource
        import numpy as np
        from qdelta import _native
        from qdelta.source import locate

        checkpoint = _native.Checkpoint(str(locate("demo")))
        tokens = np.arange(40, dtype=np.int32)

        def logits():
            session = _native.Model(checkpoint, threads=8, kv="f32").session()
            session.feed(tokens)
            return session.logits()

        want = logits()
        # A user that has nothing else: this process, and three threads more.
        os.setuid(54321)
        resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))
        assert np.array_equal(logits(), want)
        model = _native.Model(checkpoint, threads=8, kv="f32")
        print(len(os.listdir("/proc/self/task")), model.threads)
        """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    started, threads = map(int, done.stdout.split())
    assert started <= 4 and threads == 8


def test_errors_in_threads_stay_there(model):
    """A bad feed in one thread leaves the others and the model at work."""
    want = timeline(model, 3)

    def bad(_: int) -> str:
        try:
            model.native.session().feed(np.array([-5], np.int32))
        except qdelta.ArgumentError as error:
            return str(error)
        return "no error"

    with ThreadPoolExecutor(4) as pool:
        errors = pool.map(bad, range(20))
        good = [pool.submit(timeline, model, 3) for _ in range(4)]
        assert all("-5" in error for error in errors)
    for future in good:
        np.testing.assert_array_equal(future.result()[1], want[1])
