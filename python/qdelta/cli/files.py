"""Commands about files: convert, inspect."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError, FileAccessError
from ..memory import size_text
from .common import (
    KVS,
    json_option,
    offline_option,
    print_unused,
    read_text,
    reading,
    revision_option,
    shown,
    table_console,
    threads_option,
    yarn_option,
)

# Matrices that `convert --calibrate` tells the losses of.
_SHOWN_LOSSES = 5


@click.command()
@click.argument("model_name", metavar="MODEL")
@revision_option
@click.option(
    "--quant",
    "--recipe",
    "recipe",
    default="auto",
    show_default=True,
    metavar="RECIPE",
    help="balanced, small, fine, best, w4 or w8, or a file that names formats; auto is balanced, "
    "or a GGUF file's own numbers.",
)
@click.option(
    "--calibrate",
    type=click.File("rb"),
    metavar="TEXT",
    help="Round so that the outputs for this text change least, and tell which matrices lose most. "
    "Reads the model once over the text.",
)
@click.option(
    "--to",
    type=click.Choice(["qdelta", "gguf"]),
    default="qdelta",
    show_default=True,
    help="gguf: a file that llama.cpp reads.",
)
@click.option(
    "--type",
    "gguf_type",
    type=click.Choice(["BF16", "Q8_0", "Q4_0", "F16", "F32"], case_sensitive=False),
    help="Type of the matrices in a GGUF file; default: Q8_0. In Q4_0 files embedding and head are "
    "Q8_0.",
)
@click.option("-o", "--out", type=click.Path(dir_okay=False), required=True, help="File to write.")
@threads_option
@offline_option
def convert(
    model_name: str,
    revision: str | None,
    recipe: str,
    calibrate: Any,
    to: str,
    gguf_type: str | None,
    out: str,
    threads: int | None,
    offline: bool,
) -> None:
    """Convert a checkpoint or a GGUF file to one file that loads at once and needs nothing else.

    The tokenizer and the chat template travel inside. Commands and `qdelta.load` take the file
    as a MODEL. Recipes: balanced has 4 to 6 bits a weight, by what each part adds to the error;
    small at most 5, fine 4 to 6 with more of it at 5, best 6 to 8; w4 and w8 have 4 and 8
    wherever they can. A quantised GGUF file keeps its numbers.

    A recipe file has lines of a pattern and a format, of which the first that matches a matrix
    counts; the rest is as in balanced:

    \b
      embed_tokens        w6_k
      layers.0.*          w6_k|w8
      *.mlp.down_proj     w5_k

    \b
      qdelta convert Qwen/Qwen3.5-4B -o qwen3.5-4b.safetensors
      qdelta convert ./Qwen3.5-9B --recipe w8 -o qwen3.5-9b.w8.safetensors
      qdelta convert Qwen/Qwen3.5-4B --recipe mine.txt --calibrate book.txt -o mine.safetensors
      qdelta convert qwen3.5-4b-Q4_K_M.gguf -o qwen3.5-4b.safetensors
      qdelta convert Qwen/Qwen3.5-4B --to gguf --type Q8_0 -o qwen3.5-4b-Q8_0.gguf
    """
    from .. import _native, recipes, weights
    from ..source import locate

    if not Path(out).absolute().parent.is_dir():
        raise FileAccessError(errno.ENOENT, "no such folder", str(Path(out).parent))
    if to != "gguf" and out.endswith(".gguf"):
        raise click.UsageError("--out ends in .gguf; give --to gguf, or another name")
    if recipe not in ("auto", "gguf", *weights.RECIPES) and not Path(recipe).exists():
        raise click.BadParameter(
            f"{recipe!r} is no file, and no recipe: {', '.join(weights.RECIPES)}",
            param_hint="--recipe",
        )
    path = locate(model_name, revision=revision, offline=offline, cache=None, progress=None)
    source = weights.open_checkpoint(path)
    if to == "gguf":
        if recipe != "auto" or calibrate is not None:
            raise click.UsageError("--recipe and --calibrate are not for --to gguf, --type is")
        weights.convert_to_gguf(source, path, out, dtype=gguf_type or "Q8_0", threads=threads)
        click.echo(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB", err=True)
        return
    if gguf_type is not None:
        raise click.UsageError("--type is for --to gguf")
    formats = None
    if recipe == "auto":
        quant = weights.automatic(source)
    elif recipe in (*weights.RECIPES, "gguf"):
        quant = recipe
    else:
        quant, formats = "custom", recipes.formats(recipes.read(recipe), source)
    importance = None if calibrate is None else _importance(source, path, calibrate, threads)
    weights.convert(
        source, path, out, quant=quant, formats=formats, importance=importance, threads=threads
    )
    click.echo(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB", err=True)
    if importance is not None:
        _print_losses(source, _native.Checkpoint(out), importance)


def _print_losses(source: Any, converted: Any, importance: dict[str, Any]) -> None:
    """Which matrices a recipe file might give more bits."""
    from .. import calibration

    found = calibration.losses(source, converted, importance)[:_SHOWN_LOSSES]
    width = max(len(name) for name, _, _ in found)
    click.echo("Outputs for this text that change most, as a part of their power:", err=True)
    for name, format, loss in found:
        click.echo(f"  {name:{width}}  {format:9}  {loss:.2%}", err=True)


def _importance(source: Any, path: Path, file: Any, threads: int | None) -> dict[str, Any]:
    """Importance of the columns of each matrix over a text."""
    import numpy as np

    from .. import _native, calibration
    from ..source import tokenizer_files
    from ..tokenizer import Tokenizer

    text = read_text(file, "standard input" if file.name in ("-", "<stdin>") else file.name)
    tokens = Tokenizer.from_files(tokenizer_files(path, source)).encode(text)
    model = _native.Model(source, threads=threads)
    return reading(
        lambda report: calibration.importance(source, model, np.array(tokens, np.int32), report)
    )


@click.command()
@click.argument("model_name", metavar="MODEL")
@revision_option
@click.option(
    "--ctx",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Context length of the memory plan.",
)
@yarn_option
@click.option(
    "--kv",
    type=click.Choice(KVS),
    default="auto",
    help="Precision of the attention cache in the plan.",
)
@click.option("--tensors/--no-tensors", default=False, help="List every tensor.")
@click.option("--verify", is_flag=True, help="Read a converted file whole and check its hash.")
@json_option
@offline_option
def inspect(
    model_name: str,
    revision: str | None,
    ctx: int,
    yarn: float | None,
    kv: str,
    tensors: bool,
    verify: bool,
    as_json: bool,
    offline: bool,
) -> None:
    """Show what a model is: sizes, tensors, types, and the memory it needs.

    Of a GGUF file on the hub only the header is fetched, of other names the model.

    \b
      qdelta inspect Qwen/Qwen3.5-4B --ctx 32768
      qdelta inspect Qwen/Qwen3.5-9B --ctx 1010000 --yarn 4
      qdelta inspect unsloth/Qwen3.5-4B-GGUF:Q4_K_M
      qdelta inspect qwen3.5-4b.w4.safetensors --tensors --verify
    """
    from ..source import located_header

    with located_header(model_name, revision=revision, offline=offline, weights=True) as path:
        report = _report(model_name, path, ctx=ctx, yarn=yarn, kv=kv, verify=verify)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(report, tensors)


def _report(
    name: str, path: Path, *, ctx: int, yarn: float | None, kv: str, verify: bool
) -> dict[str, Any]:
    """What `inspect` shows, as plain data. Sizes in bytes."""
    from .. import _native
    from ..sizes import name_of, parameters

    checkpoint = _native.Checkpoint(str(path))
    if verify:
        if checkpoint.quant == "none":
            raise ArgumentError(f"{name}: --verify is for converted files, which have a hash")
        _native.verify(str(path))
    config = json.loads(checkpoint.config_json)
    quant = checkpoint.quant
    whole = _native.memory_plan(checkpoint, quant=quant, yarn=yarn, kv=kv)
    ctx = min(ctx, whole.context)
    plan = _native.memory_plan(checkpoint, quant=quant, context=ctx, yarn=yarn, kv=kv)
    used = yarn if yarn is not None else checkpoint.yarn
    text = config.get("text_config", config)
    tensors: list[dict[str, Any]] = [
        {"name": n, "type": dtype, "shape": list(shape), "bytes": size, "file": file}
        for n, dtype, shape, size, file in checkpoint.tensors()
    ]
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = types.setdefault(tensor["type"], {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor["bytes"]
    memory = {part: getattr(plan, part) for part in ("weights", "kv", "state", "scratch")}
    return {
        "model": name,
        "size": name_of(config),
        "parameters": parameters(config),
        "quant": checkpoint.quant,
        "metadata": {
            key: value for key, value in checkpoint.metadata.items() if key != "qdelta.config"
        },
        "config": {
            key: value for key, value in text.items() if not isinstance(value, (dict, list))
        },
        "types": types,
        "tensors": tensors,
        "unknown_tensors": checkpoint.unknown_tensors(),
        "memory": {
            "ctx": plan.context,
            "kv_type": plan.kv_format,
            **memory,
            "total": sum(memory.values()),
        },
        "context": {
            "tokens": whole.context,
            "yarn": None if used == 1 else used,
            "config_yarn": checkpoint.yarn,
        },
        "verified": True if verify else None,
    }


def _print_report(report: dict[str, Any], list_tensors: bool) -> None:
    from rich.table import Table

    console, memory = table_console(), report["memory"]
    count = f"{report['parameters'] / 1e6:,.1f} M parameters"
    console.print(f"{report['model']}: Qwen3.5 {report['size']}, {count}, quant {report['quant']}")
    if report["verified"]:
        console.print("hash verified")
    console.print(_context_line(report["context"]))
    print_unused(console, report["unknown_tensors"])
    table = Table("setting", "value", title="Config", title_justify="left")
    for key, value in report["config"].items():
        table.add_row(shown(key), shown(str(value)))
    console.print(table)
    table = Table("type", "tensors", "size", title="Types", title_justify="left")
    for name, entry in report["types"].items():
        table.add_row(shown(name), str(entry["tensors"]), size_text(entry["bytes"]))
    console.print(table)
    if list_tensors:
        table = Table("tensor", "type", "shape", "size", title="Tensors", title_justify="left")
        for tensor in report["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            table.add_row(shown(tensor["name"]), tensor["type"], shape, size_text(tensor["bytes"]))
        console.print(table)
    title = f"Memory for a context of {memory['ctx']}"
    table = Table("part", "size", title=title, title_justify="left")
    names = {
        "weights": "weights (shared, mapped)",
        "kv": f"attention cache ({memory['kv_type']})",
        "state": "recurrent and convolution state",
        "scratch": "work buffers",
        "total": "total",
    }
    for key, label in names.items():
        table.add_row(label, size_text(memory[key]))
    console.print(table)


def _context_line(context: dict[str, Any]) -> str:
    """How far the context reaches, and who extends it."""
    yarn, asked = context["yarn"], context["config_yarn"]
    said = f"YaRN factor {asked:g} of config.json" if asked else ""
    if yarn == asked:
        reason = said
    else:
        here = f"YaRN factor {yarn:g} of --yarn" if yarn else "--yarn 1"
        reason = f"{here}, instead of {said}" if said else here
    return f"context {context['tokens']}" + (f" ({reason})" if reason else "")
