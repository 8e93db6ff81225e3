"""The command `qdelta plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..memory import parse_bytes, size_text, usable_memory
from .common import (
    KVS,
    QUANTS,
    SIZE_NAMES,
    cache_option,
    counts,
    json_option,
    offline_option,
    print_unused,
    revision_option,
    table_console,
    yarn_option,
)

if TYPE_CHECKING:
    from ..planning import MemoryPlan


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A parser of names separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}: expected some of {', '.join(known)}")
        return names

    return parse


@click.command()
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option(
    "--synthetic",
    type=click.Choice(SIZE_NAMES),
    help="Plan for this released size, no files needed.",
)
@click.option(
    "--ctx",
    type=counts,
    metavar="N,N,...",
    default="4096,32768,262144",
    show_default=True,
    help="Tokens of a session; at most what the model has.",
)
@click.option(
    "--quant",
    type=_names(QUANTS),
    metavar="Q,Q,...",
    help="Formats of the weights; default: all that they can have.",
)
@click.option(
    "--kv",
    type=_names(KVS),
    metavar="KV,KV,...",
    default="auto,q8",
    show_default=True,
    help="Precisions of the attention cache.",
)
@click.option(
    "--sessions",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Conversations at the same time.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help='What may be taken, as "8 GB" or "8GiB"; default: what this computer has to spare.',
)
@yarn_option
@revision_option
@json_option
@cache_option
@offline_option
def plan(
    model_name: str | None,
    synthetic: str | None,
    ctx: list[int],
    quant: list[str] | None,
    kv: list[str],
    sessions: int,
    memory: str | None,
    yarn: float | None,
    revision: str | None,
    as_json: bool,
    cache: str | None,
    offline: bool,
) -> None:
    """What fits into memory: weights, caches and buffers of a model, before it is fetched.

    Of a name on the hub only the small files are fetched, or the header of a GGUF file. Sessions
    are planned full: memory is taken as a conversation grows. Weights are mapped files: where they
    do not fit, the system reads them again and again, and every token waits for it.

    \b
      qdelta plan Qwen/Qwen3.5-4B
      qdelta plan --synthetic 9B --ctx 8192,65536 --quant balanced --sessions 4 --memory "16 GB"
    """
    from ..planning import open_source
    from ..sizes import SIZES

    if (model_name is None) == (synthetic is None):
        raise click.UsageError("give a MODEL or --synthetic, one of them")
    if synthetic and revision is not None:
        raise click.UsageError("--revision is for names on the hub")
    if 0 in ctx:
        raise click.UsageError("--ctx: at least 1 token")
    there = usable_memory() if memory is None else parse_bytes(memory, "--memory")
    model = SIZES[synthetic] if synthetic else model_name
    assert model is not None
    plans: dict[tuple[str, str, int], MemoryPlan] = {}
    with open_source(model, revision=revision, cache=cache, offline=offline) as source:
        most, unknown = source.plan(yarn=yarn).ctx, source.unknown_tensors
        for one_quant in quant or source.quants:
            for one_kv in kv:
                for n in ctx:
                    found = source.plan(
                        quant=one_quant, kv=one_kv, ctx=min(n, most), yarn=yarn, sessions=sessions
                    )
                    # Two names may mean the same, as "auto" does.
                    plans[found.quant, found.kv_format, found.ctx] = found
    if as_json:
        entries = [
            {**asdict(p), "total": p.total, "fits": None if there is None else p.fits(there)}
            for p in plans.values()
        ]
        report = {"memory": there, "unknown_tensors": unknown, "plans": entries}
        click.echo(json.dumps(report, indent=2))
    else:
        _print(source.name, list(plans.values()), there, unknown or [])


def _print(name: str, plans: list[MemoryPlan], there: int | None, unknown: list[str]) -> None:
    """A table, what exceeds the memory marked."""
    from rich.table import Table

    console = table_console()
    sessions = plans[0].sessions
    console.print(f"{name}, {sessions} session" + "s" * (sessions != 1))
    print_unused(console, unknown)
    memory = "unknown" if there is None else size_text(there)
    console.print(f"memory to spare: {memory}; tokenizer, about {size_text(plans[0].tokenizer)}")
    table = Table()
    for column in ("quant", "cache", "context"):
        table.add_column(column)
    for column in ("weights", "cache", "states, buffers", "total"):
        table.add_column(column, justify="right")
    table.add_column("fits")
    for plan in plans:
        fits = there is None or plan.fits(there)
        table.add_row(
            plan.quant,
            plan.kv_format,
            str(plan.ctx),
            size_text(plan.weights),
            size_text(plan.sessions * plan.kv),
            size_text(plan.sessions * (plan.state + plan.scratch)),
            size_text(plan.total),
            "?" if there is None else "yes" if fits else "no",
            style=None if fits else "red",
        )
    console.print(table)
