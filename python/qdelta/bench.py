"""Speed of a model: prefill and decode apart, with llama-bench's test and field names.

A test is `pp512` (read a prompt of 512 tokens) or `tg128` (generate 128 tokens one by one), with
`@ d4096` behind it if 4096 tokens were there before. Tokens are random: speed does not depend on
them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from . import __version__, _native
from .errors import ArgumentError, Error, FileAccessError
from .session import feed_prompt
from .sizes import name_of, parameters


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

    @property
    def test(self) -> str:
        """llama-bench's name of the test."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


@dataclass(frozen=True, slots=True)
class Test:
    """What to time: reading `n_prompt` tokens or generating `n_gen`, after `n_depth` others."""

    n_prompt: int
    n_gen: int
    n_depth: int


def tests(prompts: Iterable[int], gens: Iterable[int], depths: Iterable[int]) -> list[Test]:
    """All combinations; a count of 0 is no test."""
    gens, prompts = list(gens), list(prompts)
    return [
        Test(n_prompt, n_gen, depth)
        for depth in depths
        for n_prompt, n_gen in [*((n, 0) for n in prompts if n), *((0, n) for n in gens if n)]
    ]


class Sampler:
    """Takes samples of one test on one model."""

    def __init__(self, model: _native.Model, test: Test) -> None:
        rng = np.random.default_rng(0)
        self._test = test
        self._session = model.session()
        self._tokens = _tokens(rng, test.n_prompt or test.n_gen, model)
        if test.n_depth:
            feed_prompt(self._session, _tokens(rng, test.n_depth, model), last="none")
        self._start = self._session.snapshot()

    def sample(self) -> int:
        """Nanoseconds that the test takes now."""
        self._session.restore(self._start)
        began = time.perf_counter_ns()
        if self._test.n_prompt:
            feed_prompt(self._session, self._tokens)
        else:
            for i in range(self._test.n_gen):
                self._session.feed(self._tokens[i : i + 1], "last")
        return time.perf_counter_ns() - began


def run(
    model: _native.Model,
    test: Test,
    *,
    repetitions: int,
    filename: str,
    config: dict[str, Any],
    limits: bool = False,
    against: Peer | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> tuple[Row, PeerRow | None]:
    """Time one test: a warm-up, then `repetitions` samples.

    filename: names the model in the row. limits: set each sample against what the machine could
    do at that moment, see `measure_limits`; that changes on a shared machine. against: another
    program that is measured in turn, sample by sample. on_sample: called after each sample.
    Returns the result, and that of the other program.
    """
    sampler = Sampler(model, test)
    sampler.sample()
    samples, theirs, best = [], [], []
    for _ in range(repetitions):
        if limits:
            best.append(measure_limits(model.isa, model.threads))
        samples.append(sampler.sample())
        if against is not None:
            theirs.append(against.sample(test, model.threads))
        on_sample()
    row = _row(model, test, samples, filename, config, best)
    return row, against.row(row, theirs) if against is not None else None


@dataclass(slots=True)
class PeerRow:
    """Result of another program for the test of `ours`, and the ratio of both."""

    ours: Row
    program: str
    model_type: str
    model_size: int  # bytes of its file
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    ratio: float  # median over pairs of samples of our rate by theirs
    ratio_min: float
    ratio_max: float


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

    def row(self, ours: Row, rates: list[float]) -> PeerRow:
        """The result of samples taken in turn with `ours`."""
        ratios = [a / b for a, b in zip(ours.samples_ts, rates, strict=True)]
        return PeerRow(
            ours=ours,
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


def _tokens(rng: np.random.Generator, n: int, model: _native.Model) -> Any:
    return rng.integers(0, model.vocab_size, n, dtype=np.int32)


def measure_limits(isa: str, threads: int) -> dict[str, float]:
    """What the machine could do at best; takes about a second.

    read_one, read_all: bytes per second from memory, with one thread and with all; int8_peak,
    f32_peak: operations per second of one thread on registers, two for a multiplication with
    its addition.
    """
    return _native.kernels.limits(isa, threads)


def bytes_per_token(model: _native.Model, depth: int) -> int:
    """Bytes that decoding a token moves: weights once, state read and written, cache read."""
    plan = model.memory_plan(max(depth, 1))
    cache = plan["kv"] if depth else 0
    return model.weight_bytes + 2 * plan["state"] + cache


def ceiling(
    model: _native.Model, test: Test, config: dict[str, Any], limits: dict[str, float]
) -> float:
    """Tokens per second if nothing but the limits of the machine held them up.

    Decoding is bound by memory, see `bytes_per_token`. Reading a prompt is bound by arithmetic:
    two operations a weight of the layers in int8 (in f32 if they are not quantised); in f32 seven
    for each element of the recurrent states, and four for each element of a key and a value and
    each query head.
    """
    if test.n_gen:
        return limits["read_all"] / bytes_per_token(model, test.n_depth + test.n_gen // 2)
    text = config.get("text_config", config)
    head = text["vocab_size"] * text["hidden_size"]
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    trunk = parameters(config) - (head if tied else 2 * head)
    full = text["num_hidden_layers"] // text.get("full_attention_interval", 4)
    linear = text["num_hidden_layers"] - full
    state = text["linear_num_value_heads"] * text["linear_key_head_dim"]
    state *= linear * text["linear_value_head_dim"]
    positions = test.n_depth + test.n_prompt / 2
    attention = 4 * full * text["num_attention_heads"] * text["head_dim"] * positions
    matrices = "f32_peak" if model.quant == "none" else "int8_peak"
    seconds = 2 * trunk / limits[matrices] + (7 * state + attention) / limits["f32_peak"]
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
        model_type=f"qwen35 {name_of(config)} {model.quant}",
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
    )


def format_rows(rows: Sequence[Row], form: str, peers: Sequence[PeerRow] = ()) -> str:
    """Rows as `md`, `json`, `csv` or `jsonl`, and those of another program behind them.

    csv has the fields of `Row` only, and leaves the other program out.
    """
    if form in ("json", "jsonl"):
        # The other program's rows name ours by test, not whole.
        theirs = [{**asdict(peer), "ours": peer.ours.test} for peer in peers]
        entries = [*(asdict(row) for row in rows), *theirs]
        if form == "json":
            return json.dumps(entries, indent=2)
        return "\n".join(json.dumps(entry) for entry in entries)
    if form == "csv":
        out = io.StringIO()
        names = [field.name for field in fields(Row)]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(getattr(row, name)) for name in names])
        return out.getvalue().rstrip("\n")
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("model", lambda row: row.model_type),
        ("size", lambda row: _scaled(row.model_size, 2**30, "GiB", 2**20, "MiB")),
        ("params", lambda row: _scaled(row.model_n_params, 10**9, "B", 10**6, "M")),
        ("isa", lambda row: row.isa),
        ("threads", lambda row: str(row.n_threads)),
        ("kv", lambda row: row.type_k),
        ("test", lambda row: row.test),
        ("t/s", lambda row: f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}"),
        ("GB/s", lambda row: f"{row.gb_per_s:.1f}" if row.gb_per_s else "-"),
        ("peak RSS", lambda row: f"{row.peak_rss / 2**20:.0f} MiB" if row.peak_rss else "-"),
    ]
    if any(row.limits for row in rows):
        columns.insert(-1, ("of ceiling", lambda row: f"{row.of_ceiling or 0:.2f}"))
    lines = ["| " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|" + "|".join(" --- " for _ in columns) + "|")
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    known = {(row.isa, row.n_threads): row.limits for row in rows if row.limits}
    if known:
        lines.append("")
    for (isa, threads), limits in known.items():
        lines.append(
            f"limits, {isa}, {threads} threads: memory {limits['read_one'] / 1e9:.1f} GB/s with "
            f"one thread and {limits['read_all'] / 1e9:.1f} with all, int8 "
            f"{limits['int8_peak'] / 1e9:.0f} and f32 {limits['f32_peak'] / 1e9:.0f} Gop/s a thread"
        )
    if peers:
        lines += ["", format_peer_rows(peers)]
    return "\n".join(lines)


def _scaled(value: int, large: int, unit: str, small: int, small_unit: str) -> str:
    """As llama-bench writes it, in the smaller unit below one tenth of the larger."""
    if value >= large / 10:
        return f"{value / large:.2f} {unit}"
    return f"{value / small:.2f} {small_unit}"


def format_peer_rows(rows: Sequence[PeerRow]) -> str:
    """A Markdown table of both programs and their ratio, a test a line."""
    lines = [
        "| test | threads | ours | t/s | theirs | t/s | ours / theirs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours = row.ours
        lines.append(
            f"| {ours.test} | {ours.n_threads} | {ours.model_type} "
            f"| {ours.avg_ts:.2f} ± {ours.stddev_ts:.2f} | {row.model_type} "
            f"| {row.avg_ts:.2f} ± {row.stddev_ts:.2f} "
            f"| {row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f}) |"
        )
    return "\n".join(lines)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


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
    size: str, *, quant: str, threads: int | None = None, kv: str = "auto", isa: str | None = None
) -> tuple[_native.Model, dict[str, Any]]:
    """A model of a released size with random weights, and its config."""
    from .sizes import SIZES

    if size not in SIZES:
        raise ArgumentError(f"size is {size!r}, expected one of: {', '.join(SIZES)}")
    if quant == "auto":
        quant = "w4"
    config = SIZES[size]
    model = _native.Model.synthetic(
        json.dumps(config), quant=quant, threads=threads, kv=kv, isa=isa
    )
    return model, config


def load_file(
    path: str | os.PathLike[str],
    *,
    quant: str,
    cache: str | None = None,
    progress: bool | None = None,
    threads: int | None = None,
    kv: str = "auto",
    isa: str | None = None,
) -> tuple[_native.Model, dict[str, Any]]:
    """The model at `path`, without its tokenizer, and its config."""
    from . import weights

    checkpoint = weights.open_model(os.fspath(path), quant, cache, progress)
    model = _native.Model(checkpoint, threads=threads, kv=kv, isa=isa)
    return model, json.loads(checkpoint.config_json)
