"""The checkpoint's own chat template, rendered the way the reference implementation does.

A template is a Jinja program that turns messages into one text. It runs in Jinja's immutable
sandbox with trim_blocks, lstrip_blocks and loop controls; `tojson` is `json.dumps` without
ASCII escapes, so separators are ", " and ": ", keys keep their order, and nothing is escaped
for HTML.

`render` gives the text. `render_marked` gives the same text with a mark before and after every
special token that the template itself wrote: marks are put into the literals of the compiled
program, so no text that passes through the program can acquire one. Only literals whose value
is written out are marked; those that the program compares with or splits at stay as they are,
so the program takes the same path on the same messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ArgumentError, FileError

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes

# Noncharacters: Unicode reserves them for a program's own use, so the first is nearly always free.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# Variables that a caller may set although a template does not read them.
COMMON_OPTIONS = frozenset({"add_generation_prompt", "enable_thinking", "add_vision_id"})

# Conversations without special tokens of their own, to see that marking misses none.
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
_PROBES: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ([{"role": "user", "content": "a"}], None),
    (
        [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "reasoning_content": "d"},
            {"role": "user", "content": "e"},
        ],
        None,
    ),
    (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [_CALL, _CALL]},
            {"role": "tool", "content": "c"},
            {"role": "tool", "content": "d"},
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    ),
]


class ChatTemplate:
    """A compiled template.

    specials: the special strings of the vocabulary. variables: named token strings
    (`eos_token`, ...) that the template may refer to. Raises FileError if the template is not
    valid Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        specials: Iterable[str],
        variables: Mapping[str, str],
        file_name: str = "chat_template.jinja",
    ) -> None:
        import jinja2
        from jinja2 import meta

        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._variables = dict(variables)
        self._environment = _environment()
        self._source = source
        self._marked: dict[str, jinja2.Template] = {}
        self._markable: bool | None = None  # None: not tried yet
        try:
            tree = self._environment.parse(source)
            self.reads = frozenset(
                meta.find_undeclared_variables(tree) - self._environment.globals.keys()
            )
            self._plain = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f"{file_name}:{line}" if line else file_name
            raise FileError(f"{place}: not a valid template: {str(error)[:300]}") from error

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
    ) -> str:
        """The text of the conversation.

        Raises ArgumentError with the template's own words where the template refuses it.
        """
        return _run(self._plain, messages, tools, {**self._variables, **options})

    def render_marked(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
    ) -> tuple[str, list[str]] | None:
        """The text, and its pieces: ordinary text and special tokens in turn, text first.

        Special tokens among the pieces are those that the template wrote, never those spelled
        out in messages or tools. None for a template that cannot be marked: it puts special
        tokens together from parts, or its path depends on its own output.
        """
        if self._markable is None:
            self._markable = all(self._marks_all(*probe) for probe in _PROBES)
        return self._render_marked(messages, tools, options) if self._markable else None

    def _marks_all(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> bool:
        """Whether every special token of a harmless conversation is a marked one."""
        try:
            marked = self._render_marked(messages, tools, {"add_generation_prompt": True})
        except ArgumentError:  # the template does not take such conversations
            return True
        return marked is not None and marked[1] == self._specials.split(marked[0])

    def _render_marked(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
    ) -> tuple[str, list[str]] | None:
        text = self.render(messages, tools, options)
        mark = next((mark for mark in _MARKS if mark not in text), None)
        if mark is None:
            raise ArgumentError("messages: all of the noncharacters U+FDD0 to U+FDEF are in use")
        if mark not in self._marked:
            self._marked[mark] = self._compile_marked(mark)
        variables = {name: self._mark(value, mark) for name, value in self._variables.items()}
        marked = _run(self._marked[mark], messages, tools, {**variables, **options})
        pieces = marked.split(mark)
        return (text, pieces) if "".join(pieces) == text else None

    def _mark(self, literal: str, mark: str) -> str:
        return self._specials.sub(lambda found: mark + found.group() + mark, literal)

    def _compile_marked(self, mark: str) -> jinja2.Template:
        from jinja2 import nodes
        from jinja2.optimizer import optimize

        # Constants are folded first, so that a token put together from literals is one literal.
        tree = optimize(self._environment.parse(self._source), self._environment)
        assert isinstance(tree, nodes.Template), "folding constants keeps the root"
        for literal in _written_literals(tree):
            if hasattr(literal, "data"):
                literal.data = self._mark(literal.data, mark)
            elif isinstance(literal.value, str):
                literal.value = self._mark(literal.value, mark)
        return self._environment.from_string(tree)


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


def _run(
    template: jinja2.Template,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
) -> str:
    import jinja2

    try:
        return template.render({**variables, "messages": messages, "tools": tools})
    except jinja2.TemplateError as error:
        raise ArgumentError(f"chat template: {error.message}") from error
    except Exception as error:  # whatever Python raises on a value that the template cannot use
        raise ArgumentError(f"chat template: {type(error).__name__}: {error}") from error


def _written_literals(tree: nodes.Template) -> Iterable[Any]:
    """Literals whose value reaches the output as it is: Const and TemplateData nodes."""
    from jinja2 import nodes

    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    pending: list[nodes.Node | None] = []
    for output in tree.find_all(nodes.Output):
        pending.extend(output.nodes)
    pending.extend(assign.node for assign in tree.find_all(nodes.Assign))
    while pending:
        node = pending.pop()
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            yield node
        elif isinstance(node, nodes.Add):
            pending += [node.left, node.right]
        elif isinstance(node, nodes.Concat):
            pending += node.nodes
        elif isinstance(node, nodes.CondExpr):
            pending += [node.expr1, node.expr2]
        elif isinstance(node, (nodes.And, nodes.Or)):
            pending += [node.left, node.right]
        elif isinstance(node, nodes.Filter):
            pending.append(node.node)
        elif isinstance(node, nodes.Call):
            callee = node.node
            is_macro = isinstance(callee, nodes.Name) and callee.name in macros
            if is_macro or (isinstance(callee, nodes.Name) and callee.name == "namespace"):
                pending += node.args
                pending += [keyword.value for keyword in node.kwargs]
