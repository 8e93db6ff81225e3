"""Commands that keep models: pull, list, rm, verify, export, import."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..memory import size_text
from .common import RECIPES, json_option, offline_option, revision_option, table_console

if TYPE_CHECKING:
    from ..inventory import Held

cache_option = click.option(
    "--cache", type=click.Path(file_okay=False), help="Folder for converted and kept models."
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.command()
@click.argument("name")
@revision_option
@click.option(
    "--only",
    metavar="FORM",
    help="balanced, small, fine, best, w4 or w8: convert, keep only the result. gguf:TYPE: only "
    "this file, as gguf:Q4_K_M.",
)
@yes_option
@cache_option
def pull(name: str, revision: str | None, only: str | None, yes: bool, cache: str | None) -> None:
    """Fetch a model from the Hugging Face Hub, or what is new of it.

    With --only and a recipe the model is converted, the result is kept under its name, and the
    original weights are removed from the hub's cache: nothing but the converted model stays. Until
    then both need room. `load`, `chat` and all others then use it by its name, without network and
    without looking for news; another `pull` fetches them. A `pull` without --only fetches the
    original again, which takes the place of what was kept.

    A lost connection is taken up again where it broke. After a stop, files that are whole are not
    fetched again.

    \b
      qdelta pull Qwen/Qwen3.5-4B
      qdelta pull Qwen/Qwen3.5-4B --only balanced
      qdelta pull unsloth/Qwen3.5-4B-GGUF --only gguf:Q4_K_M
    """
    from .. import hub, keep

    if only in RECIPES and not yes:
        before = sum(hub.weights_here(name).values())
        if before:
            click.confirm(
                f"{size_text(before)} of the original weights are in the hub's cache already, "
                "perhaps for other programs. Remove them when the model is converted?",
                abort=True,
                err=True,
            )
    path = keep.pull(name, revision=revision, only=only, cache=cache)
    click.echo(f"{keep.full_name(name, only)} is in {path}", err=True)


@click.command("list")
@json_option
@cache_option
def list_models(as_json: bool, cache: str | None) -> None:
    """Show which models are here: fetched, kept, converted.

    "hub" is a model in the hub's cache, "kept" one that `pull --only` or `import` has put under
    its name, "converted" a file that is made again when it is missing. Folders elsewhere are not
    listed.

    \b
      qdelta list
      qdelta list --json
    """
    from .. import inventory

    models = inventory.held(cache)
    if as_json:
        click.echo(json.dumps([_as_data(one) for one in models], indent=2))
    elif models:
        _print_models(models)
    else:
        click.echo("no models here; `qdelta pull Qwen/Qwen3.5-0.8B` fetches one", err=True)


def _as_data(one: Held) -> dict[str, Any]:
    return {**asdict(one), "refs": list(one.refs), "path": str(one.path)}


def _print_models(models: Sequence[Held]) -> None:
    from rich.table import Table

    table = Table("model", "where", "weights", "size", "last use", "revision", "note")
    for one in models:
        revision = ", ".join(one.refs) or (one.revision or "")[:8]
        used = time.strftime("%Y-%m-%d", time.localtime(one.last_used))
        table.add_row(
            one.name, one.place, one.quant, size_text(one.bytes), used, revision, one.problem
        )
    table_console().print(table)


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--converted", is_flag=True, help="Only converted files, which a load makes again.")
@yes_option
@cache_option
def rm(names: tuple[str, ...], converted: bool, yes: bool, cache: str | None) -> None:
    """Remove models from this computer, and tell how much was freed.

    What is removed is listed and asked for first: the model's folder in the hub's cache with all
    its revisions, what was kept under its name, and its converted files. Nothing else is touched.

    \b
      qdelta rm Qwen/Qwen3.5-4B
      qdelta rm unsloth/Qwen3.5-4B-GGUF:Q4_K_M
      qdelta rm --converted ./Qwen3.5-9B
    """
    from .. import inventory

    options: dict[str, Any] = {"converted": converted, "cache": cache}
    found = [one for name in names for one in inventory.removals(name, **options)]
    if not yes:
        for one in found:
            click.echo(f"{one.what}: {one.path} ({size_text(one.bytes)})", err=True)
        click.confirm("Remove?", abort=True, err=True)
    freed = sum(inventory.remove(name, **options) for name in names)
    click.echo(f"{size_text(freed)} freed")


@click.command()
@click.argument("model_name", metavar="MODEL")
@revision_option
@click.option("--online", is_flag=True, help="Ask the hub for hashes; else its cache knows them.")
@json_option
@cache_option
def verify(
    model_name: str, revision: str | None, online: bool, as_json: bool, cache: str | None
) -> int:
    """Read a model whole and compare every file with its hash; exit status 1 if one differs.

    MODEL is a name, for all that is here of it, a converted file, or a folder that `qdelta
    export` made. Files from the hub are compared with the hashes by which the hub names them,
    converted files with their own hash and with what they were made from, other folders with
    their manifest.

    \b
      qdelta verify Qwen/Qwen3.5-4B
      qdelta verify Qwen/Qwen3.5-4B --online
      qdelta verify ./qwen3.5-4b-folder
    """
    from .. import archive
    from ..verification import verify

    result = verify(model_name, revision=revision, online=online, cache=cache)
    if as_json:
        files = [{**asdict(file), "path": str(file.path)} for file in result.files]
        click.echo(json.dumps({"ok": result.ok, "files": files}, indent=2))
        return 0 if result.ok else 1
    for file in result.bad:
        click.echo(f"{file.path}: {file.problem}")
    click.echo(f"{len(result.files)} files, {len(result.bad)} bad", err=True)
    if (Path(model_name) / archive.MANIFEST).is_file():
        _tell_manifest(Path(model_name))
    return 0 if result.ok else 1


@click.command()
@click.argument("model_name", metavar="MODEL")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--quant", type=click.Choice(RECIPES), help="Converted; default: as it is.")
@revision_option
@offline_option
@cache_option
def export(
    model_name: str,
    folder: str,
    quant: str | None,
    revision: str | None,
    offline: bool,
    cache: str | None,
) -> None:
    """Write a model with all that belongs to it to a new FOLDER, to be carried elsewhere.

    Weights, tokenizer, template, licence, README, and qdelta-manifest.json with the hash of every
    file and the origin. Commands take the folder as a MODEL; `qdelta import` keeps it under its
    name. Compare the manifest's hash, which export, verify and import print, to be sure that all
    of it is what was sent.

    \b
      qdelta export Qwen/Qwen3.5-4B /media/stick/qwen3.5-4b --quant balanced
      qdelta export unsloth/Qwen3.5-4B-GGUF:Q4_K_M ./qwen-gguf
    """
    from .. import keep

    out = keep.export(
        model_name, folder, quant=quant, revision=revision, offline=offline, cache=cache
    )
    click.echo(f"{model_name} is in {out}", err=True)
    _tell_manifest(out)


@click.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--as", "name", metavar="NAME", help="Name to keep it under; default: it had.")
@cache_option
def import_(folder: str, name: str | None, cache: str | None) -> None:
    """Keep the model of a FOLDER that `qdelta export` made, to be used by its name offline.

    Every file is compared with the manifest first; if one differs, nothing is imported.

    \b
      qdelta import /media/stick/qwen3.5-4b
      qdelta import ./my-tuned-4b --as me/tuned-4b
    """
    from .. import keep

    name = keep.import_folder(folder, name=name, cache=cache)
    click.echo(f"{name} is here", err=True)
    _tell_manifest(Path(folder))


def _tell_manifest(folder: Path) -> None:
    from .. import archive

    click.echo(f"manifest sha256 {archive.manifest_hash(folder)}")
