"""The command `qdelta bench`."""

from __future__ import annotations

import sys

import click


def counts(text: str) -> list[int]:
    """Numbers separated by commas, as llama-bench takes them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers separated by commas") from None
    if any(number < 0 for number in numbers):
        raise click.BadParameter(f"{text!r}: expected no negative number")
    return numbers


@click.command()
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option(
    "--synthetic",
    type=click.Choice(["0.8B", "2B", "4B", "9B"]),
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
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "csv", "jsonl"]),
    default="md",
    show_default=True,
)
@click.option(
    "--quant", type=click.Choice(["auto", "none", "w8", "w4"]), default="auto", show_default=True
)
@click.option("--kv", type=click.Choice(["auto", "f16", "f32", "q8"]), default="auto")
@click.option("--isa", help="Instruction set, as avx512 or avx2; default: the best.")
@click.option("--limits", is_flag=True, help="Set results against what the machine could do.")
@click.option(
    "--against", metavar="PROGRAM", help="Measure llama-bench (of llama.cpp or a fork) in turn."
)
@click.option("--against-model", metavar="FILE", help="Its GGUF file.")
@click.option("--cache", type=click.Path(file_okay=False), help="Folder for converted files.")
@click.option("--offline", is_flag=True, help="Touch no network.")
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
    limits: bool,
    against: str | None,
    against_model: str | None,
    cache: str | None,
    offline: bool,
) -> None:
    """Measure speed: prefill (pp) and decode (tg) apart, with llama-bench's names.

    Samples follow a warm-up; a rate is the mean over samples, ± their standard deviation.
    With --against the samples of both programs alternate, and the ratio is the median over pairs.

    \b
      qdelta bench --synthetic 0.8B
      qdelta bench Qwen/Qwen3.5-4B -p 512,4096 -n 64 -d 0,16384 -t 1,2 -o json
      qdelta bench --synthetic 4B --against ./llama-bench --against-model qwen3.5-4b-q4_0.gguf
    """
    from .. import bench as benchmark
    from ..progress import wanted
    from ..source import locate

    if (model_name is None) == (synthetic is None):
        raise click.UsageError("give a MODEL or --synthetic, one of them")
    cases = benchmark.tests(n_prompt, n_gen, n_depth)
    if not cases:
        raise click.UsageError("nothing to measure: -p and -n are 0")
    thread_counts: list[int | None] = list(threads) if threads else [None]
    if 0 in thread_counts:
        raise click.UsageError("-t: at least 1 thread")
    if (against is None) != (against_model is None):
        raise click.UsageError("--against and --against-model go together")
    peer = benchmark.Peer(against, against_model) if against and against_model else None
    path = locate(model_name, offline=offline, cache=cache, progress=None) if model_name else None
    rows, peer_rows = [], []
    total = len(cases) * len(thread_counts) * repetitions
    with click.progressbar(
        length=total, label="Measuring", file=sys.stderr, hidden=not wanted(None)
    ) as bar:
        for count in thread_counts:
            if synthetic:
                model, config = benchmark.load_synthetic(
                    synthetic, quant=quant, threads=count, kv=kv, isa=isa
                )
            else:
                assert path is not None
                model, config = benchmark.load_file(
                    path, quant=quant, cache=cache, threads=count, kv=kv, isa=isa
                )
            name = model_name or f"synthetic {synthetic}"
            for case in cases:
                row, peer_row = benchmark.run(
                    model,
                    case,
                    repetitions=repetitions,
                    filename=name,
                    config=config,
                    limits=limits,
                    against=peer,
                    on_sample=lambda: bar.update(1),
                )
                rows.append(row)
                if peer_row is not None:
                    peer_rows.append(peer_row)
            del model
    click.echo(benchmark.format_rows(rows, output, peer_rows))
