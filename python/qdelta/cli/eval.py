"""The command `qdelta eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .common import (
    LOADING_NAMES,
    QUANTS,
    check_plot,
    json_option,
    loading_options,
    plot_option,
    read_text,
    reading,
    saved_option,
)

if TYPE_CHECKING:
    from ..llm import Model
    from ..quality import Quality

# Settings of MODEL that are not the reference's.
_OWN = ("revision", "quant", "kv", "head")


@click.command("eval")
@click.argument("model_names", metavar="MODEL...", nargs=-1)
@click.option("--text", "file", type=click.File("rb"), help="UTF-8 text; - is standard input.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens that are scored together.",
)
@click.option(
    "--against", metavar="MODEL", help="The reference whose predictions are the right ones."
)
@click.option(
    "--against-quant",
    type=click.Choice(QUANTS),
    help="--quant of the reference; default: the weights as its files have them.",
)
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Tokens to show at which a single MODEL differs most.",
)
@plot_option("Draw KL against bits")
@saved_option("Results of --against and --json to draw, with those of this run; may be repeated.")
@json_option
@loading_options
def evaluate(
    model_names: tuple[str, ...],
    file: Any,
    window: int,
    against: str | None,
    against_quant: str | None,
    worst: int,
    plot: str | None,
    saved: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Quality on a text: perplexity, and with --against the distance to another model.

    The text is read as UTF-8 and tokenised as a whole, no token is added. It is cut into windows
    of --window tokens that do not overlap; an incomplete last window is left out. Each runs alone
    from an empty state, and all its tokens but the first are scored. Perplexity is exp of the
    mean negative log-probability, lower is better. All logits are computed in full; with --head
    screened, both heads read the text and their 20 likeliest tokens are compared.

    \b
      qdelta eval Qwen/Qwen3.5-0.8B --text novel.txt
      qdelta eval Qwen/Qwen3.5-0.8B --text novel.txt --quant none
      qdelta eval Qwen/Qwen3.5-0.8B --text novel.txt --head screened

    --against runs a reference beside each MODEL and tells the KL divergence of their
    distributions, KL(reference || MODEL), in nats per scored token: 0 is no difference. "Same
    top" is how often both hold the same token most likely. Both are loaded at once. --revision,
    --quant, --kv and --head are settings of MODEL; the reference has the weights as its files have
    them, so the first line tells what the usual quantisation of a model costs.

    \b
      qdelta eval ./Qwen3.5-4B --against ./Qwen3.5-4B --text novel.txt
      qdelta eval 4b.small.safetensors 4b.best.safetensors --against ./Qwen3.5-4B \\
          --text novel.txt --plot kl.svg
      qdelta eval --plot kl.svg --from small.json --from best.json
    """
    _check_usage(model_names, file, against, plot, saved, options)
    if against_quant is not None and against is None:
        raise click.UsageError("--against-quant is for --against")
    rows = []
    if saved:
        from ..quality import read_qualities

        rows = [row for path in saved for row in read_qualities(path)]
    if model_names:
        text = read_text(file, "standard input" if file.name in ("-", "<stdin>") else file.name)
        if against is None:
            _perplexity(model_names[0], text, window, as_json, options)
        else:
            reference = against, _load_reference(against, against_quant, options)
            found = [
                _compare(name, reference, text, window, worst, options) for name in model_names
            ]
            _show(found, as_json)
            rows += found
    if plot is not None:
        from .. import plots

        plots.plot_quality(rows, plot)


def _check_usage(
    model_names: tuple[str, ...],
    file: Any,
    against: str | None,
    plot: str | None,
    saved: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    if not model_names and not saved:
        raise click.UsageError("give a MODEL, or --plot and --from")
    if model_names and file is None:
        raise click.UsageError("--text is missing")
    if len(model_names) > 1 and against is None:
        raise click.UsageError("several MODELs are for --against")
    if against is not None and options["head"] == "screened":
        raise click.UsageError("--against computes all logits; --head screened is without it")
    if plot is not None and model_names and against is None:
        raise click.UsageError("--plot draws comparisons; give --against")
    check_plot(plot, saved)


def _load_reference(name: str, quant: str | None, options: dict[str, Any]) -> Model:
    """The reference: a folder's own weights, or what a converted file is, unless told otherwise.

    Settings that may change what it says, beside the length of its context, are not MODEL's.
    """
    from ..loading import load
    from ..source import locate

    shared = {key: options[key] for key in LOADING_NAMES if key not in _OWN}
    path = locate(name, offline=options["offline"], cache=options["cache"], progress=None)
    return load(path, quant=quant or ("none" if path.is_dir() else "auto"), **shared)


def _compare(
    name: str,
    reference: tuple[str, Model],
    text: str,
    window: int,
    worst: int,
    options: dict[str, Any],
) -> Quality:
    from ..loading import load
    from ..quality import quality

    model = load(name, **{key: options[key] for key in LOADING_NAMES})
    found = reading(
        lambda report: model.compare(
            reference[1], text, window=window, worst=worst, progress=report
        )
    )
    return quality(found, window, (name, model), reference)


def _show(rows: list[Quality], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from ..report import table

    first = rows[0]
    title = (
        f"against {first.against}, {first.against_quant}, perplexity "
        f"{first.reference_perplexity:.4f}; {first.scored} tokens scored in windows of "
        f"{first.window}; KL in nats a token"
    )
    columns = ("model", "quant", "bits", "perplexity", "mean KL", "median", "99 %", "99.9 %")
    lines = [
        (
            row.model,
            row.quant,
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.4f}",
            *(f"{kl:.5f}" for kl in (row.mean_kl, row.median_kl, row.p99_kl, row.p999_kl)),
            f"{row.max_kl:.3f}",
            f"{row.same_top:.2%}",
        )
        for row in rows
    ]
    click.echo(table(title, (*columns, "largest", "same top"), lines))
    if len(rows) == 1 and first.worst:
        worst = [
            (
                f"{token['kl']:.3f}",
                *(repr(token[key]) for key in ("before", "token", "likeliest")),
                repr(token["reference_likeliest"]),
            )
            for token in first.worst
        ]
        names = ("KL", "after", "came", "model's likeliest", "reference's likeliest")
        click.echo("\n" + table("Where they differ most", names, worst))


def _perplexity(name: str, text: str, window: int, as_json: bool, options: dict[str, Any]) -> None:
    from ..loading import load

    model = load(name, **{key: options[key] for key in LOADING_NAMES})
    screening = None
    if options["head"] == "screened":
        screening = reading(lambda report: model.screening(text, window=window, progress=report))
    result = reading(lambda report: model.perplexity(text, window=window, progress=report))
    rate = result.timings.prefill_tokens_per_s
    if as_json:
        click.echo(
            json.dumps(
                {
                    "model": name,
                    "quant": model.native.quant,
                    "perplexity": result.perplexity,
                    "perplexity_second_half": result.second_half,
                    "mean_loss": result.mean_loss,
                    "windows": result.windows,
                    "scored": result.scored,
                    "tokens_per_s": rate,
                    "screening": None if screening is None else asdict(screening),
                }
            )
        )
        return
    click.echo(
        f"perplexity {result.perplexity:.4f} ({result.windows} windows of {window}, "
        f"{result.scored} tokens scored)"
    )
    click.echo(f"second half of the windows {result.second_half:.4f}")
    click.echo(f"{rate:.1f} tokens per second")
    if screening is not None:
        click.echo(
            f"screened head: {screening.missed} of {screening.k * screening.positions} candidates "
            f"missed, at {screening.missed_positions} of {screening.positions} positions"
        )
        click.echo(
            f"{screening.scored:.2%} of the logits computed exactly, {screening.most_scored:.2%} "
            f"at most, and all of them at {screening.full_positions} positions"
        )
