"""Conversations: checking and levelling what callers pass before a template sees it.

Clients differ in spelling. Here `developer` becomes `system`, system messages join at the
front, tool-call arguments given as JSON text become objects, and everything else that the
template could not use is refused with the place it stands at.
"""

from __future__ import annotations

import json
from collections import UserString
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from .errors import ArgumentError, UnsupportedError
from .results import Message

SystemPolicy = Literal["merge", "strict"]

ROLES = ("system", "user", "assistant", "tool")

# Types whose text is known to be harmless, or is that of their parts.
_PLAIN = frozenset({str, dict, list, tuple, bool, int, float, type(None)})
# Sequences with nothing inside that is not in their text, or without an end of parts.
_NOT_LISTS = (bytes, bytearray, memoryview, range, UserString)


def level_messages(messages: Any, *, system: SystemPolicy = "merge") -> list[dict[str, Any]]:
    """Messages in the one form that templates understand; the argument is left as it was.

    messages: sequence of mappings with `role` and `content`, or of `Message` results.
    system: "merge" joins all system messages, in order, into one at the front; "strict" refuses
    any that is not the first message. Raises ArgumentError naming the message at fault.
    """
    if system not in ("merge", "strict"):
        raise ArgumentError(f'system: "merge" or "strict" expected, got {system!r}')
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ArgumentError(f"messages: a list of messages expected, got {type(messages).__name__}")
    if not messages:
        raise ArgumentError("messages: empty; at least one message is needed")
    level = [_level(message, f"messages[{index}]") for index, message in enumerate(messages)]
    late = [index for index, message in enumerate(level) if index and message["role"] == "system"]
    if not late:
        return level
    if system == "strict":
        raise ArgumentError(f"messages[{late[0]}]: a system message must be the first message")
    texts = [text_of(message) for message in level if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text.strip())}
    return [merged, *(message for message in level if message["role"] != "system")]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message's content, parts joined as templates join them."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def check_tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    """Tool descriptions as given. Raises ArgumentError unless None or a list of mappings."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ArgumentError(f"tools: a list of mappings expected, got {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ArgumentError(f"tools[{index}]: a mapping expected, got {type(tool).__name__}")
    return tools


def refuse_pictures(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise UnsupportedError if a message carries an image or a video."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if _kind_of_part(part) in ("image", "video"):
                raise UnsupportedError(
                    f"messages[{index}].content: images and video are not supported"
                )


def strings_in(value: Any) -> Iterator[str]:
    """Every text that a template could write out of nested mappings and lists, keys included.

    Of a value that JSON does not know (a set, a path, any object) it is the text that Python
    gives it; subclasses may give themselves any text.
    """
    pending = [value]
    # Containers met, by address: a structure may hold itself. They are kept, since an address
    # means another object once the first is gone.
    seen: dict[int, Any] = {}
    while pending:
        item = pending.pop()
        if type(item) not in _PLAIN:
            yield str(item)
        if isinstance(item, str):
            yield item
        elif id(item) in seen:
            continue
        elif isinstance(item, Mapping):
            seen[id(item)] = item
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, Sequence) and not isinstance(item, _NOT_LISTS):
            seen[id(item)] = item
            pending.extend(item)


def _level(message: Any, place: str) -> dict[str, Any]:
    if isinstance(message, Message):
        message = message.to_dict()
    if not isinstance(message, Mapping):
        raise ArgumentError(f"{place}: a mapping expected, got {type(message).__name__}")
    entry = dict(message)
    role = entry.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise ArgumentError(
            f"{place}.role: unknown role {role!r}; expected one of {', '.join(ROLES)}"
        )
    entry["role"] = role
    if entry.get("content") is not None:
        entry["content"] = _level_content(entry["content"], role, f"{place}.content")
    if role == "assistant":
        if "reasoning_content" not in entry and isinstance(entry.get("reasoning"), str):
            entry["reasoning_content"] = entry["reasoning"]
        if entry.get("tool_calls") is not None:
            entry["tool_calls"] = _level_calls(entry["tool_calls"], f"{place}.tool_calls")
    return entry


def _level_content(content: Any, role: str, place: str) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise ArgumentError(
            f"{place}: text or a list of parts expected, got {type(content).__name__}"
        )
    for index, part in enumerate(content):
        kind = _kind_of_part(part)
        if kind is None:
            raise ArgumentError(f"{place}[{index}]: not a text, image or video part")
        if kind != "text" and role == "system":
            raise ArgumentError(f"{place}[{index}]: a system message cannot hold an {kind}")
        if kind == "text" and not isinstance(part["text"], str):
            raise ArgumentError(
                f"{place}[{index}].text: text expected, got {type(part['text']).__name__}"
            )
    return list(content)


def _kind_of_part(part: Any) -> Literal["image", "video", "text"] | None:
    """The kind as templates see it: by the keys first, whatever `type` says."""
    if not isinstance(part, Mapping):
        return None
    if "image" in part or "image_url" in part or part.get("type") == "image":
        return "image"
    if "video" in part or part.get("type") == "video":
        return "video"
    return "text" if "text" in part else None


def _level_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise ArgumentError(f"{place}: a list of calls expected, got {type(calls).__name__}")
    level = []
    for index, call in enumerate(calls):
        where = f"{place}[{index}]"
        if not isinstance(call, Mapping):
            raise ArgumentError(f"{where}: a mapping expected, got {type(call).__name__}")
        if "function" in call:
            function = _level_function(call["function"], f"{where}.function")
            level.append({**call, "function": function})
        else:
            level.append(_level_function(call, where))
    return level


def _level_function(function: Any, place: str) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise ArgumentError(f"{place}: a mapping expected, got {type(function).__name__}")
    if not isinstance(function.get("name"), str):
        raise ArgumentError(f"{place}.name: text expected, got {function.get('name')!r}")
    entry = dict(function)
    arguments = entry.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"{place}.arguments: not valid JSON: {error}") from error
    if arguments is None:
        entry.pop("arguments", None)
    elif isinstance(arguments, Mapping):
        entry["arguments"] = arguments
    else:
        raise ArgumentError(
            f"{place}.arguments: an object expected, got {type(arguments).__name__}"
        )
    return entry
