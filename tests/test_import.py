"""What importing the package costs, and that the stubs state what the extension has."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import qdelta
from qdelta import _native

# All dependencies, and what of the standard library is slow to import.
LATE = (
    "asyncio", "click", "huggingface_hub", "jinja2", "numpy", "rich", "qdelta._native",
)  # fmt: skip


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def test_import_is_light():
    code = f"import sys, qdelta; print(*(name for name in {LATE!r} if name in sys.modules))"
    assert python(code) == ""


@pytest.mark.parametrize(
    ("use", "unneeded"),
    [
        ('qdelta.load("demo").generate("Once", max_tokens=2)',
         ("asyncio", "click", "huggingface_hub", "jinja2", "rich")),
        ('qdelta.Tokenizer("demo").encode("Once")',
         ("click", "huggingface_hub", "jinja2", "numpy", "rich")),
        ("import qdelta.cli", ("numpy", "huggingface_hub", "jinja2", "rich")),
    ],
)  # fmt: skip
def test_uses_import_what_they_need(use: str, unneeded: tuple[str, ...]):
    code = f"import sys, qdelta; {use}; print(*(n for n in {unneeded!r} if n in sys.modules))"
    assert python(code) == ""


def test_every_public_name_is_there():
    for name in qdelta.__all__:
        assert getattr(qdelta, name) is not None
    assert set(qdelta.__all__) <= set(dir(qdelta))
    assert not any(name.startswith("_") for name in qdelta.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qdelta.nonsense


@pytest.mark.parametrize("name", ["py.typed", "_native.pyi", "demo/NOTICE.md"])
def test_files_of_the_package(name: str):
    assert importlib.resources.files("qdelta").joinpath(name).is_file()


# ---------------------------------------------------------------------------------------- stubs


def stub() -> ast.Module:
    return ast.parse((Path(qdelta.__file__).parent / "_native.pyi").read_text())


def names_in(body: list[ast.stmt]) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in body if isinstance(node, kinds)}


def names_of(thing: object) -> set[str]:
    """Public names of a module or class of the extension, and its constructor."""
    own = vars(thing)
    return {name for name in own if not name.startswith("_")} | ({"__new__"} & set(own))


def test_stub_and_extension_have_the_same_names():
    assert names_in(stub().body) == names_of(_native)


@pytest.mark.parametrize("node", [n for n in stub().body if isinstance(n, ast.ClassDef)],
                         ids=lambda node: node.name)  # fmt: skip
def test_stub_and_class_have_the_same_members(node: ast.ClassDef):
    assert names_in(node.body) == names_of(getattr(_native, node.name))


def parameters(node: ast.FunctionDef) -> list[tuple[str, bool, object]]:
    """(name, keyword only, default) of each, without self."""
    args, none = node.args, inspect.Parameter.empty
    places = [*args.posonlyargs, *args.args]
    defaults = [none] * (len(places) - len(args.defaults))
    defaults += [ast.literal_eval(default) for default in args.defaults]
    found = [(arg.arg, False, default) for arg, default in zip(places, defaults, strict=True)] + [
        (arg.arg, True, none if default is None else ast.literal_eval(default))
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return [entry for entry in found if entry[0] not in ("self", "cls")]


def functions() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for node in stub().body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            found += [
                (f"{node.name}.{member.name}", member)
                for member in node.body
                if isinstance(member, ast.FunctionDef)
                and not any(
                    isinstance(mark, ast.Name) and mark.id == "property"
                    for mark in member.decorator_list
                )
            ]
    return found


@pytest.mark.parametrize(("name", "node"), functions(), ids=[name for name, _ in functions()])
def test_stub_and_extension_have_the_same_parameters(name: str, node: ast.FunctionDef):
    owner, _, member = name.rpartition(".")
    thing = getattr(_native, owner) if owner else _native
    if member != "__new__":
        thing = getattr(thing, member)
    signature = inspect.signature(thing)
    found = [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default)
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    ]
    assert parameters(node) == found


def test_every_part_of_the_stub_says_what_it_is():
    for name, node in functions():
        if name.endswith((".__new__", ".restore", ".session")):
            continue  # the class says it
        assert ast.get_docstring(node), name
