"""Speed of a model: prefill and decode apart, with llama-bench's test and field names.

A test is `pp512` (read a prompt of 512 tokens) or `tg128` (generate 128 tokens one by one), with
`@ d4096` behind it if 4096 tokens were there before; see `trial`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, _native, costs
from .errors import ArgumentError, Error, FileAccessError
from .profiling import Part, profile
from .sizes import name_of, parameters
from .trial import Test, Trial


@dataclass(slots=True)
class PeerResult:
    """What another program did in a test, and the ratio of both."""

    program: str
    model_type: str
    model_size: int  # bytes of its file
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    ratio: float  # median over pairs of samples of our rate by theirs
    ratio_min: float
    ratio_max: float


@dataclass(slots=True)
class Row:
    """Result of one test. Times in nanoseconds, rates in tokens per second, sizes in bytes."""

    build_commit: str
    build_number: int
    cpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int  # weights that a decoded token reads
    model_n_params: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    type_k: str
    type_v: str
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]
    isa: str
    quant: str
    bytes_per_token: int  # of weights, state and cache that a decoded token moves; 0 for prefill
    gb_per_s: float  # of these per second; 0 for prefill
    peak_rss: int | None  # of the process so far
    ceiling_ts: float | None = None  # tokens per second that the limits allow; None: not measured
    of_ceiling: float | None = None  # median over samples of the rate as a part of it
    limits: dict[str, float] | None = None  # see `measure_limits`; medians over samples
    profile: dict[str, Part] | None = None  # see `profiling`; where the time of a stream goes
    against: PeerResult | None = None  # another program at the same test
    head: str = "full"  # or "screened"
    yarn: float | None = None  # factor by which the context is extended

    @property
    def test(self) -> str:
        """llama-bench's name of the test."""
        return Test(self.n_prompt, self.n_gen, self.n_depth).name


def tests(prompts: Iterable[int], gens: Iterable[int], depths: Iterable[int]) -> list[Test]:
    """All combinations; a count of 0 is no test."""
    gens, prompts = list(gens), list(prompts)
    return [
        Test(n_prompt, n_gen, depth)
        for depth in depths
        for n_prompt, n_gen in [*((n, 0) for n in prompts if n), *((0, n) for n in gens if n)]
    ]


def run(
    model: _native.Model,
    test: Test,
    *,
    repetitions: int,
    filename: str,
    config: dict[str, Any],
    limits: bool = False,
    profiled: bool = False,
    against: Peer | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> Row:
    """Time one test: a warm-up, then `repetitions` samples.

    filename: names the model in the row. limits: set each sample against what the machine could
    do at that moment, see `measure_limits`; that changes on a shared machine. profiled: then run
    it as often again to tell where the time goes, see `profiling`. against: another program that
    is measured in turn, sample by sample. on_sample: called after each sample.
    """
    trial = Trial(model, test)
    trial.warm_up()
    samples, theirs, best = [], [], []
    for _ in range(repetitions):
        if limits:
            best.append(measure_limits(model.isa, model.threads))
        samples.append(trial.sample())
        if against is not None:
            theirs.append(against.sample(test, model.threads))
        on_sample()
    row = _row(model, test, samples, filename, config, best)
    if profiled:
        row.profile = profile(trial, config, repetitions)
    if against is not None:
        row.against = against.result(row.samples_ts, theirs)
    return row


class Peer:
    """llama-bench of llama.cpp or of ik_llama.cpp, found by its path.

    program: the executable; model: its GGUF file.
    """

    def __init__(self, program: str, model: str) -> None:
        found = shutil.which(program)
        if found is None:
            raise ArgumentError(f"{program}: no such program")
        if not os.path.exists(model):
            raise FileAccessError(f"{model}: no such file")
        self._program, self._model = found, model
        self._about: dict[str, Any] = {}

    def sample(self, test: Test, threads: int) -> float:
        """Tokens per second in one run of the program, which warms up by itself."""
        counts = {"-p": test.n_prompt, "-n": test.n_gen, "-d": test.n_depth, "-t": threads}
        # Without -d where it is 0: older versions do not know it.
        numbers = [str(x) for name, n in counts.items() if n or name != "-d" for x in (name, n)]
        command = [self._program, "-m", self._model, *numbers, "-r", "1", "-o", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            entries = json.loads(done.stdout)
            self._about = next(e for e in entries if e["n_gen"] == test.n_gen)
            return float(self._about["avg_ts"])
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise Error(f"{self._program}: exit {error.returncode}: {last}") from error
        except (ValueError, KeyError, StopIteration) as error:
            raise Error(f"{self._program}: its output is not llama-bench's JSON") from error

    def result(self, ours: list[float], rates: list[float]) -> PeerResult:
        """The result of samples taken in turn with `ours`, both in tokens per second."""
        ratios = [a / b for a, b in zip(ours, rates, strict=True)]
        return PeerResult(
            program=self._program,
            model_type=str(self._about.get("model_type", "")),
            model_size=int(self._about.get("model_size", 0)),
            avg_ts=statistics.fmean(rates),
            stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
            samples_ts=rates,
            ratio=statistics.median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
        )


def measure_limits(isa: str, threads: int) -> dict[str, float]:
    """What the machine could do at best; takes about a second.

    read_one, read_all: bytes per second from memory, with one thread and with all; int8_peak,
    f32_peak: operations per second of one thread on registers, two for a multiplication with
    its addition.
    """
    return _native.kernels.limits(isa, threads)


def bytes_per_token(model: _native.Model, depth: int) -> int:
    """Bytes that decoding a token moves after `depth` others; see `costs`."""
    return sum(costs.decode_bytes(model, depth).values())


def ceiling(
    model: _native.Model, test: Test, config: dict[str, Any], limits: dict[str, float]
) -> float:
    """Tokens per second if nothing but the limits of the machine held them up.

    Decoding is bound by memory, reading a prompt by arithmetic, see `costs`: int8 for the
    matrices, or f32 if they are not quantised, and f32 for the rest.
    """
    if test.n_gen:
        return limits["read_all"] / bytes_per_token(model, test.n_depth + test.n_gen // 2)
    operations = costs.prefill_operations(config, test.n_depth + test.n_prompt / 2)
    matrices = "f32_peak" if model.quant == "none" else "int8_peak"
    seconds = operations.pop("matrices") / limits[matrices]
    seconds += sum(operations.values()) / limits["f32_peak"]
    return float(model.threads / seconds)


def _row(
    model: _native.Model,
    test: Test,
    samples: list[int],
    filename: str,
    config: dict[str, Any],
    limits: Sequence[dict[str, float]],
) -> Row:
    n = test.n_prompt or test.n_gen
    rates = [n * 1e9 / sample for sample in samples]
    rate = statistics.fmean(rates)
    moved = bytes_per_token(model, test.n_depth + test.n_gen // 2) if test.n_gen else 0
    ceilings = [ceiling(model, test, config, each) for each in limits]
    parts = [rate / best for rate, best in zip(rates, ceilings, strict=bool(limits))]
    return Row(
        build_commit=__version__,
        build_number=0,
        cpu_info=cpu_name(),
        backends="CPU",
        model_filename=filename,
        model_type=f"qwen35 {name_of(config)} {model.quant}"
        + (" screened" if model.head == "screened" else ""),
        model_size=model.weight_bytes,
        model_n_params=parameters(config),
        n_batch=512,
        n_ubatch=512,
        n_threads=model.threads,
        type_k=model.kv,
        type_v=model.kv,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        test_time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        avg_ns=round(statistics.fmean(samples)),
        stddev_ns=round(statistics.stdev(samples)) if len(samples) > 1 else 0,
        avg_ts=rate,
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples_ns=samples,
        samples_ts=rates,
        isa=model.isa,
        quant=model.quant,
        bytes_per_token=moved,
        gb_per_s=moved * rate / 1e9,
        peak_rss=peak_rss(),
        ceiling_ts=statistics.median(ceilings) if limits else None,
        of_ceiling=statistics.median(parts) if limits else None,
        limits={name: statistics.median(each[name] for each in limits) for name in limits[0]}
        if limits
        else None,
        head=model.head,
        yarn=model.yarn,
    )


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_rss() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where unknown."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_synthetic(
    size: str, *, quant: str, **settings: Any
) -> tuple[_native.Model, dict[str, Any]]:
    """A model of a released size with random weights, and its config.

    settings: as for `_native.Model.synthetic`.
    """
    from .sizes import SIZES

    if size not in SIZES:
        raise ArgumentError(f"size is {size!r}, expected one of: {', '.join(SIZES)}")
    if quant == "auto":
        quant = "balanced"
    config = SIZES[size]
    model = _native.Model.synthetic(json.dumps(config), quant=quant, **settings)
    return model, config


def load_file(
    path: str | os.PathLike[str],
    *,
    quant: str,
    cache: str | None = None,
    progress: bool | None = None,
    threads: int | None = None,
    **settings: Any,
) -> tuple[_native.Model, dict[str, Any]]:
    """The model at `path`, without its tokenizer, and its config.

    threads, settings: as for `_native.Model`.
    """
    from . import weights

    checkpoint = weights.open_model(os.fspath(path), quant, cache, progress, threads=threads)
    model = _native.Model(checkpoint, threads=threads, **settings)
    return model, json.loads(checkpoint.config_json)
