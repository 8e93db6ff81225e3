"""The command `qdelta bench`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from .common import (
    KVS,
    QUANTS,
    SIZE_NAMES,
    cache_option,
    check_plot,
    counts,
    head_option,
    isa_option,
    offline_option,
    plot_option,
    revision_option,
    saved_option,
    yarn_option,
)

if TYPE_CHECKING:
    from ..bench import Row
    from ..progress import StepBar
    from ..report import Report


@click.command()
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option(
    "--synthetic",
    type=click.Choice(SIZE_NAMES),
    help="Random weights at the shapes of this size, no files needed.",
)
@click.option(
    "-p",
    "--n-prompt",
    type=counts,
    metavar="N,N,...",
    default="512",
    show_default=True,
    help="Prompt tokens to read.",
)
@click.option(
    "-n",
    "--n-gen",
    type=counts,
    metavar="N,N,...",
    default="128",
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "-d",
    "--n-depth",
    type=counts,
    metavar="N,N,...",
    default="0",
    show_default=True,
    help="Tokens that are there before.",
)
@click.option(
    "-t", "--threads", type=counts, metavar="N,N,...", help="Threads; default: one per core."
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Samples of each test.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "csv", "jsonl"]),
    default="md",
    show_default=True,
)
@click.option("--quant", type=click.Choice(QUANTS), default="auto", show_default=True)
@click.option("--kv", type=click.Choice(KVS), default="auto")
@isa_option
@head_option
@yarn_option
@click.option("--limits", is_flag=True, help="Set results against what the machine could do.")
@click.option("--profile", is_flag=True, help="Tell where the time goes, part by part.")
@click.option(
    "--against", metavar="PROGRAM", help="Measure llama-bench (of llama.cpp or a fork) in turn."
)
@click.option(
    "--against-model", metavar="FILE", help="Its GGUF file; without, MODEL's, if that is one."
)
@plot_option("Draw the results")
@saved_option(
    "Results of -o json to draw, with those of this run if there is one; may be repeated."
)
@revision_option
@cache_option
@offline_option
def bench(
    model_name: str | None,
    synthetic: str | None,
    n_prompt: list[int],
    n_gen: list[int],
    n_depth: list[int],
    threads: list[int] | None,
    repetitions: int,
    output: str,
    quant: str,
    kv: str,
    isa: str | None,
    head: str,
    yarn: float | None,
    limits: bool,
    profile: bool,
    against: str | None,
    against_model: str | None,
    plot: str | None,
    saved: tuple[str, ...],
    revision: str | None,
    cache: str | None,
    offline: bool,
) -> None:
    """Measure speed: prefill (pp) and decode (tg) apart, with llama-bench's names.

    Samples follow a warm-up; a rate is the mean over samples, ± their standard deviation. Rows
    come as they are done, JSON at the end; after Ctrl-C what was measured is kept.

    \b
      qdelta bench --synthetic 0.8B
      qdelta bench Qwen/Qwen3.5-4B -p 512,4096 -n 64 -d 0,16384 -t 1,2 -o json > 4b.json

    --limits measures memory and arithmetic of the machine before each sample, and shows the rate
    as a part of what they allow. --profile runs each test as the stream a user gets, and shows
    which part of the model, the sampler or Python the time goes to. With --against the samples of
    both programs alternate, and the ratio is the median over pairs. A screened head
    is asked for 20 candidates after each step, a full one gives all logits.

    \b
      qdelta bench --synthetic 0.8B --limits --profile
      qdelta bench --synthetic 4B --against ./llama-bench --against-model qwen3.5-4b-q4_0.gguf
      qdelta bench qwen3.5-4b-q4_k_m.gguf --against ./llama-bench

    --plot draws what the results hold: rates against depth (several -d), parts of the ceiling
    (--limits), both programs (--against), profiles. It also draws saved results.

    \b
      qdelta bench --synthetic 0.8B -d 0,4096,16384 --plot depth.svg
      qdelta bench --plot sizes.png --from 0.8b.json --from 4b.json
    """
    from .. import bench as benchmark
    from .. import gguf_names, plots
    from ..progress import StepBar
    from ..report import Csv, Json, JsonLines, Markdown, read_rows
    from ..source import locate

    check_plot(plot, saved)
    rows = [row for file in saved for row in read_rows(file)]
    if saved and model_name is None and synthetic is None:
        if not rows:
            raise click.UsageError("--from: no results in " + ", ".join(saved))
        assert plot is not None
        plots.plot(rows, plot)
        return
    if (model_name is None) == (synthetic is None):
        raise click.UsageError("give a MODEL or --synthetic, one of them")
    if synthetic and revision is not None:
        raise click.UsageError("--revision is for names on the hub")
    cases = benchmark.tests(n_prompt, n_gen, n_depth)
    if not cases:
        raise click.UsageError("nothing to measure: -p and -n are 0")
    thread_counts: list[int | None] = list(threads) if threads else [None]
    if 0 in thread_counts:
        raise click.UsageError("-t: at least 1 thread")
    if against is None and against_model is not None:
        raise click.UsageError("--against-model is the file of the program of --against")
    path = None
    if model_name is not None:
        path = locate(model_name, revision=revision, offline=offline, cache=cache, progress=None)
    peer = None
    if against is not None:
        if against_model is None:
            if path is None or path.suffix != gguf_names.SUFFIX:
                raise click.UsageError("--against reads GGUF files: name one as --against-model")
            against_model = str(path)
        peer = benchmark.Peer(against, against_model)
    settings: dict[str, Any] = {"kv": kv, "isa": isa, "head": head, "yarn": yarn}
    reports: dict[str, Report] = {
        "md": Markdown(limits=limits), "json": Json(), "jsonl": JsonLines(), "csv": Csv(),
    }  # fmt: skip
    report = reports[output]
    with _kept(rows, report, plot), StepBar(len(cases) * len(thread_counts) * repetitions) as bar:
        for count in thread_counts:
            if synthetic:
                model, config = benchmark.load_synthetic(
                    synthetic, quant=quant, threads=count, **settings
                )
            else:
                assert path is not None
                model, config = benchmark.load_file(
                    path, quant=quant, cache=cache, threads=count, **settings
                )
            for case in cases:
                bar.describe(f"{case.name} -t {model.threads}")
                row = benchmark.run(
                    model,
                    case,
                    repetitions=repetitions,
                    filename=model_name or f"synthetic {synthetic}",
                    config=config,
                    limits=limits,
                    profiled=profile,
                    against=peer,
                    on_sample=bar.step,
                )
                rows.append(row)
                _say(report.add(row), bar)
            del model


@contextmanager
def _kept(rows: list[Row], report: Report, plot: str | None) -> Iterator[None]:
    """Finish report and plot of the rows there are when the block ends, in whatever way."""
    from .. import plots

    n_saved = len(rows)
    try:
        yield
    finally:
        if len(rows) > n_saved:
            _say(report.end())
            if plot is not None:
                plots.plot(rows, plot)


def _say(text: str, bar: StepBar | None = None) -> None:
    if not text:
        return
    with bar.hidden() if bar else nullcontext():
        click.echo(text)
