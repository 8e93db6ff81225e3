"""Text to token ids and back, and conversations to prompts.

Encoding: added tokens (`<|im_end|>`, `<think>`, ...) are found first, leftmost and longest;
each piece of text between them is normalised to NFC, split, and encoded by BPE on its own.

Prompts made of messages are encoded apart: a special token counts only where the chat template
wrote it. The same characters inside a message, a tool description or a tool's answer are
ordinary text, so a user cannot end a turn or open another.
"""

from __future__ import annotations

import codecs
import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import vocabulary
from .chat import SystemPolicy, check_tools, level_messages, strings_in
from .errors import ArgumentError, UnsupportedError
from .results import Message
from .source import located_header, tokenizer_files
from .template import COMMON_OPTIONS, ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Callable

# The splitting pattern walks back through a run of white space once; the library gives up, and
# panics, beyond 10 million steps.
_MAX_WHITE_SPACE = 5_000_000


class Tokenizer:
    """A checkpoint's tokenizer and chat template; reads no weights.

    source: a folder, a GGUF or converted file, "demo", or a name on the hub. revision, offline,
    cache, progress: as in `qdelta.load`. Raises FileError, FileAccessError or UnsupportedError.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        revision: str | None = None,
        offline: bool = False,
        cache: str | Path | None = None,
        progress: bool | None = None,
    ) -> None:
        with located_header(
            source, revision=revision, offline=offline, cache=cache, progress=progress
        ) as path:
            self._set_up(tokenizer_files(path))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """A tokenizer from the contents of its files (name -> content)."""
        self = cls.__new__(cls)
        self._set_up(files)
        return self

    def _set_up(self, files: Mapping[str, bytes]) -> None:
        known = vocabulary.build(files)
        self._encoder = known.encoder
        self._ids_of_added = {token.text: token.id for token in known.added.values()}
        self._texts_of_added = {id: text for text, id in self._ids_of_added.items()}
        texts = sorted(self._ids_of_added, key=len, reverse=True)  # longest first
        # A group, so that re.split keeps the separators: text, token, text, ..., text.
        self._split = re.compile("(" + ("|".join(map(re.escape, texts)) or r"(?!)") + ")")
        self._heads = tuple(text[:n] for text in texts for n in range(1, len(text)))
        self._tails = tuple(text[n:] for text in texts for n in range(1, len(text)))
        self._bytes: dict[int, bytes] = {
            token.id: token.text.encode() for token in known.added.values()
        }
        self._special = frozenset(token.id for token in known.added.values() if token.special)
        self.vocab_size: int = known.size
        self.chat_template: str | None = known.chat_template
        self._named_tokens = known.named_tokens
        self._template: ChatTemplate | None = None

    # Text and ids

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; nothing is added in front or behind.

        special: read spelled-out special tokens (`<|im_end|>`) as these tokens, as the reference
        does; False: as ordinary text. Raises ArgumentError for lone surrogates.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text: str expected, got {type(text).__name__}")
        return self.encode_pieces(self._split.split(text) if special else [text])

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of ordinary text and added tokens in turn: text, token, text, ..., text."""
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._ids_of_added[piece])
            elif piece:
                ids += self._encode_ordinary(piece)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; U+FFFD for each malformed part, nothing for ids without text.

        skip_special: leave out special tokens; `<think>` and the tool tags are not special.
        """
        skipped = self._special if skip_special else frozenset()
        parts = [self.token_bytes(id) for id in _int_list(ids) if id not in skipped]
        return b"".join(parts).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True) -> TextDecoder:
        """An incremental decoder."""
        return TextDecoder(self, skip_special=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for; empty for ids without text."""
        known = self._bytes.get(id)
        if known is not None:
            return known
        text = self._encoder.token(id) if 0 <= id < self.vocab_size else None
        content = b"" if text is None else _bytes_of(text)
        if text is not None:
            self._bytes[id] = content
        return content

    def token_id(self, text: str) -> int | None:
        """The id of the added token spelled `text`, None if there is none."""
        return self._ids_of_added.get(text)

    def difference(self, other: Tokenizer) -> str | None:
        """The first token that another tokenizer has otherwise, in words; None if there is none."""
        if self.vocab_size != other.vocab_size:
            return f"{self.vocab_size} and {other.vocab_size} of them"
        for id in range(self.vocab_size):
            mine, others = self._stored_text(id), other._stored_text(id)
            if mine != others:
                return f"token {id} is {mine!r} and {others!r}"
        return None

    def _stored_text(self, id: int) -> str | None:
        """A token as the tokenizer's file spells it."""
        return self._texts_of_added.get(id) or self._encoder.token(id)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode(skip_special=True) leaves out."""
        return self._special

    def __len__(self) -> int:
        return self.vocab_size

    # Conversations

    def render(self, messages: Any, tools: Any = None, **options: Any) -> str:
        """The prompt text, exactly as the checkpoint's template writes it.

        options: variables of the template (`add_generation_prompt`, `enable_thinking`, ...); one
        that is not given stays undefined. Messages are passed as they are: what `render_ids`
        would level (`developer`, late system messages, arguments as JSON text) is refused here
        if the template refuses it. Raises ArgumentError with the template's words, TypeError for
        an unknown option.
        """
        if not messages:
            raise ArgumentError("messages: empty; at least one message is needed")
        plain = [m.to_dict() if isinstance(m, Message) else m for m in messages]
        return self._chat_template(options).render(plain, tools, options)

    def render_ids(
        self,
        messages: Any,
        tools: Any = None,
        *,
        system: SystemPolicy = "merge",
        **options: Any,
    ) -> list[int]:
        """Token ids of the prompt, template and caller's text encoded apart.

        Equal to encode(render(...)) if no message and no tool spells out a special token.
        system: what to do with system messages that are not first, "merge" or "strict".
        """
        level = level_messages(messages, system=system)
        return self.encode_pieces(self.render_pieces(level, tools, **options))

    def render_pieces(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **options: Any
    ) -> list[str]:
        """The prompt as `encode_pieces` takes it: text, special token, text, ..., text.

        messages: as `level_messages` returns them.
        """
        template = self._chat_template(options)
        if check_tools(tools) and "tools" not in template.reads:
            raise UnsupportedError("this checkpoint's chat template has no place for tools")
        if not any(map(self._touches_special, strings_in([messages, tools, options]))):
            return self._split.split(template.render(messages, tools, options))
        marked = template.render_marked(messages, tools, options)
        if marked is None:
            raise UnsupportedError(
                "chat template: it reads its own output, so special tokens spelled out in "
                "messages cannot be told from its own"
            )
        return marked[1]

    def reads_option(self, name: str) -> bool:
        """Whether the chat template looks at the variable `name`."""
        return name in self._chat_template({}).reads

    def _touches_special(self, text: str) -> bool:
        """Whether `text` holds an added token, or could be one end of it beside other text."""
        if self._split.search(text):
            return True
        text = text.strip()
        return text.endswith(self._heads) or text.startswith(self._tails)

    def _chat_template(self, options: Mapping[str, Any]) -> ChatTemplate:
        if self._template is None:
            if self.chat_template is None:
                raise UnsupportedError("this checkpoint has no chat template")
            self._template = ChatTemplate(
                self.chat_template,
                specials=self._ids_of_added,
                variables=self._named_tokens,
            )
        known = (self._template.reads | COMMON_OPTIONS) - {"messages", "tools"}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"unknown template option {name!r}{hint}")
        return self._template

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text.isascii():
            _refuse_surrogates(text)
        if len(text) > _MAX_WHITE_SPACE:
            longest = max((len(run) for run in re.findall(r"\s+", text)), default=0)
            if longest > _MAX_WHITE_SPACE:
                raise ArgumentError(
                    f"text: a run of {longest} white space characters; "
                    f"at most {_MAX_WHITE_SPACE} are supported"
                )
        return self._encoder.encode(text)


class TextDecoder:
    """Tokens in, text out, as soon as the UTF-8 of a character is whole.

    The concatenation of all results, `finish` included, equals `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that token `id` completes, possibly empty."""
        return "" if id in self._skipped else self._utf8.decode(self._token_bytes(id))

    def finish(self) -> str:
        """U+FFFD if an incomplete character is pending, else empty; the decoder starts anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte: printable bytes stand for themselves, the other 68 from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {byte: byte for byte in printable}
    alphabet.update({0x100 + index: byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[ord(character)] for character in token])
    except KeyError:  # not spelled in the byte alphabet: an added token inside the vocabulary
        return token.encode("utf-8")


def _int_list(ids: Iterable[int]) -> list[int]:
    tolist: Callable[[], list[int]] | None = getattr(ids, "tolist", None)  # numpy
    listed = list(ids) if tolist is None else tolist()
    for place, id in enumerate(listed):
        if type(id) is not int:
            try:
                listed[place] = id = operator.index(id)  # numpy's integers
            except TypeError:
                raise ArgumentError(f"ids: token ids expected, got {id!r}") from None
        if id < 0:
            raise ArgumentError(f"ids: token ids of 0 and more expected, got {id!r}")
    return listed


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"text: lone surrogate U+{ord(text[error.start]):04X} at position {error.start}; "
            "text must be valid Unicode"
        ) from error
