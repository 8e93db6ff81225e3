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
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from . import __version__, _native
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
    gb_per_s: float  # weights read per second of decoding; 0 for prefill
    peak_rss: int | None  # of the process so far

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


def run(
    model: _native.Model,
    test: Test,
    *,
    repetitions: int,
    filename: str,
    config: dict[str, Any],
    on_sample: Callable[[], None] = lambda: None,
) -> Row:
    """Time one test: a warm-up, then `repetitions` samples.

    filename: names the model in the row. on_sample: called after each sample.
    """
    rng = np.random.default_rng(0)
    session = model.session()
    if test.n_depth:
        feed_prompt(session, _tokens(rng, test.n_depth, model), last="none")
    start = session.snapshot()
    samples = []
    for repetition in range(repetitions + 1):
        session.restore(start)
        if test.n_prompt:
            tokens = _tokens(rng, test.n_prompt, model)
            began = time.perf_counter_ns()
            feed_prompt(session, tokens)
        else:
            tokens = _tokens(rng, test.n_gen, model)
            began = time.perf_counter_ns()
            for i in range(test.n_gen):
                session.feed(tokens[i : i + 1], "last")
        sample = time.perf_counter_ns() - began
        if repetition:
            samples.append(sample)
            on_sample()
    return _row(model, test, samples, filename, config)


def _tokens(rng: np.random.Generator, n: int, model: _native.Model) -> Any:
    return rng.integers(0, model.vocab_size, n, dtype=np.int32)


def _row(
    model: _native.Model, test: Test, samples: list[int], filename: str, config: dict[str, Any]
) -> Row:
    n = test.n_prompt or test.n_gen
    rates = [n * 1e9 / sample for sample in samples]
    rate = statistics.fmean(rates)
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
        gb_per_s=model.weight_bytes * rate / 1e9 if test.n_gen else 0.0,
        peak_rss=peak_rss(),
    )


def format_rows(rows: Sequence[Row], form: str) -> str:
    """Rows as `md`, `json`, `csv` or `jsonl`."""
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=2)
    if form == "jsonl":
        return "\n".join(json.dumps(asdict(row)) for row in rows)
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
    lines = ["| " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|" + "|".join(" --- " for _ in columns) + "|")
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def _scaled(value: int, large: int, unit: str, small: int, small_unit: str) -> str:
    """As llama-bench writes it, in the smaller unit below one tenth of the larger."""
    if value >= large / 10:
        return f"{value / large:.2f} {unit}"
    return f"{value / small:.2f} {small_unit}"


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


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
    from .errors import ArgumentError
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
