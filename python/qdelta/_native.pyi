"""The compiled core as Python sees it. It knows tokens and numbers; `Encoder` alone knows text.

Everything here releases the interpreter lock while it works. Errors are the classes of
`qdelta.errors`. int32 and float32 arrays must be contiguous; returned arrays are copies.
"""

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class Checkpoint:
    """An opened and validated checkpoint: a folder, a GGUF file, or one converted file.

    Only headers are read. Raises FileError (naming file and tensor, expected and found),
    UnsupportedError or FileAccessError.
    """

    def __new__(cls, path: str) -> Checkpoint: ...
    @property
    def config_json(self) -> str:
        """The text of config.json."""

    @property
    def quant(self) -> str:
        """What the weights were converted to: "w8", "w4", "gguf", or "none"."""

    @property
    def convention(self) -> str:
        """What the numbers mean: "transformers", or "gguf" for a GGUF file and what was converted
        from one (norms have 1 added, A_log is -exp(A_log), value heads are in another order)."""

    def gguf_keys(self) -> list[str]:
        """Keys of a GGUF file's metadata; else empty."""

    def gguf_value(self, key: str) -> Any:
        """A value of a GGUF file's metadata, int, float, bool, str or a list of them; None if
        there is none. Raises FileError for a string that is no UTF-8."""

    @property
    def yarn(self) -> float | None:
        """The factor by which config.json extends the context (YaRN), None if it does not."""

    @property
    def metadata(self) -> dict[str, str]:
        """Entries of a converted file ("qdelta.version", "qdelta.recipe", ...); else empty."""

    def attachment(self, name: str) -> bytes | None:
        """The content of a file carried inside a converted file, None if it has none of it."""

    def sources(self) -> list[tuple[str, int, int]]:
        """(name, bytes, modification time in ns) of the files; of a converted file, those it
        was made from."""

    def is_conversion_of(self, source: Checkpoint) -> bool:
        """Whether this is what the conversion of `source` to the same recipe would be: made of the
        same files, in the formats that the recipe has now."""

    def matrices(self) -> list[tuple[str, int, int]]:
        """(name, rows, columns) of the matrices of the text model and of multi-token prediction,
        by the names that checkpoints have without the prefix of the text model."""

    def unknown_tensors(self) -> list[str]:
        """Names of tensors that nothing reads and no part of a released model has."""

    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, str]]:
        """(name in the file, dtype or format, shape, bytes, file) of every tensor."""

def convert(
    source: Checkpoint,
    out: str | None,
    *,
    quant: str,
    attachments: list[tuple[str, str | bytes]],
    formats: dict[str, str] | None = None,
    importance: dict[str, NDArray[np.float32]] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint | None:
    """Write `source` as one file by the recipe `quant`: "w8", "w4", "small", "balanced", "fine",
    "best", "custom" (balanced, but for `formats`), or "gguf" for a GGUF file.

    out: None: make it in memory, and return it opened. attachments: (name, path or content) of
    files to carry along. formats: of matrices by name, before those of the recipe: "keep", "w4_r",
    "w4_nl_r", "w5_r", "w4_k", "w5_k", "w6_k", "w4", "w4_nl", "w5_planes", "w8",
    "w8_planes". importance: how much each column of a matrix matters, by its name; float32
    [columns], not negative. threads: 1 to 1024; None: as for `Model`.
    progress is called with (bytes done, bytes in all). The file appears under its name only when
    complete; Ctrl-C leaves nothing.
    """

def export_gguf(
    source: Checkpoint,
    out: str,
    *,
    dtype: str,
    metadata: list[tuple[str, Any]],
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the text model and multi-token prediction of `source` as a GGUF file.

    dtype: of the matrices, "BF16", "F16", "F32", "Q8_0" or "Q4_0". metadata: beside that of the
    architecture; int is stored as u32, float as f32, a list of int as i32. threads, progress, and
    what is left behind by an error: as for `convert`. Raises ArgumentError if `out` exists.
    """

def losses(
    source: Checkpoint, formats: list[str], importance: dict[str, NDArray[np.float32]]
) -> list[tuple[str, str, int, float]]:
    """(matrix, format, bytes, loss) of each matrix in each format that takes it.

    The loss is the part of the power of the matrix's output that is error, if `importance` is the
    mean square of its inputs; 1 for matrices that are not there. It is measured on 512 of the rows.
    """

def verify(path: str) -> None:
    """Recompute the hash of a converted file. Raises FileError if it is not the recorded one."""

def gguf_header_bytes(start: str, length: int) -> int | None:
    """Bytes that metadata and tensor table take in a GGUF file of `length` bytes.

    start: a file with the first of these bytes. None: it holds too few to tell. Raises FileError
    for what can be no header, whatever follows; UnsupportedError for other versions.
    """

@final
class Model:
    """Weights and their arithmetic; immutable, to be shared by any number of threads."""

    def __new__(
        cls,
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        yarn: float | None = None,
        threads: int | None = None,
        kv: str = "auto",
        isa: str | None = None,
        head: str = "full",
        memory_limit: int | None = None,
    ) -> Model:
        """memory_limit: bytes that weights, sessions and snapshots may hold together; without
        `context` the largest that fits is taken. Raises MemoryLimitError."""

    @staticmethod
    def synthetic(
        config_json: str,
        *,
        quant: str,
        seed: int = 0,
        context: int | None = None,
        yarn: float | None = None,
        threads: int | None = None,
        kv: str = "auto",
        isa: str | None = None,
        head: str = "full",
        memory_limit: int | None = None,
    ) -> Model:
        """A model of random weights at the shapes of `config_json`, for measurements."""

    @property
    def isa(self) -> str:
        """The instruction set in use, one of `instruction_sets()`."""

    @property
    def threads(self) -> int: ...
    @property
    def kv(self) -> str:
        """Format of the KV cache: "f16", "f32" or "q8"."""

    @property
    def head(self) -> str:
        """How sessions find candidates: "screened" if that was asked for and the weights are
        quantised, else "full"."""

    @property
    def quant(self) -> str:
        """Format of the weights, "none", "w8" or "w4"."""

    @property
    def context(self) -> int:
        """Tokens that a session can hold."""

    @property
    def yarn(self) -> float | None:
        """The factor by which YaRN extends the context, None if nothing extends it."""

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits, padded rows included."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decoded token reads: trunk and head."""

    @property
    def settled(self) -> bool:
        """Whether single tokens were enough to find out how weights are best read here."""

    @property
    def head_bytes(self) -> int:
        """Those of `weight_bytes` that the head reads; a screened one reads one of its planes."""

    @property
    def memory_held(self) -> int:
        """Bytes that weights, sessions and snapshots hold now, of what a limit would allow."""

    def memory_plan(self, context: int) -> MemoryPlan:
        """What the weights and a session of `context` tokens take."""

    def session(self) -> Session:
        """A new, empty timeline. Raises MemoryLimitError."""

@final
class MemoryPlan:
    """Bytes by purpose."""

    @property
    def context(self) -> int:
        """Tokens of a session."""

    @property
    def kv_format(self) -> str:
        """Format of the KV cache: "f16", "f32" or "q8"."""

    @property
    def weights(self) -> int:
        """All tensors of the text model."""

    @property
    def kv(self) -> int:
        """KV cache of a full session."""

    @property
    def state(self) -> int:
        """Recurrent and convolution states of a session."""

    @property
    def scratch(self) -> int:
        """Work buffers of a session."""

def memory_plan(
    model: Checkpoint | str,
    *,
    quant: str,
    dtype: str = "bfloat16",
    context: int | None = None,
    yarn: float | None = None,
    threads: int | None = None,
    kv: str = "auto",
    head: str = "full",
    memory_limit: int | None = None,
) -> MemoryPlan:
    """What a model converted to `quant` takes, as `Model` would with the same settings.

    model: its checkpoint, or the text of its config.json, whose weights have the type `dtype`
    ("bfloat16", "float16", "float32") but for those that it says are FP8. Raises MemoryLimitError
    as `Model` does.
    """

@final
class Session:
    """One timeline of tokens with its KV cache and recurrent states. Thread safe."""

    @property
    def n_tokens(self) -> int: ...
    def tokens(self) -> NDArray[np.int32]:
        """All tokens fed so far. int32 [n_tokens]."""

    def feed(self, tokens: NDArray[np.int32], logits: str = "last") -> None:
        """Append tokens.

        tokens: int32 [n]. logits: which rows go through the head, "none", "last" or "all".
        Raises ContextError, MemoryLimitError or ArgumentError (ids outside the vocabulary) before
        anything changes.
        """

    def logits(self) -> NDArray[np.float32]:
        """The rows that the last feed kept. float32 [rows, vocab]."""

    def gather(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Entries `ids` of the last row. int32 [n] -> float32 [n]."""

    def candidates(
        self,
        k: int,
        *,
        limit: int,
        ids: NDArray[np.int32],
        values: NDArray[np.float32],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k largest entries of the last row among ids below `limit`, largest first.

        Entries `ids` count as `values` (int32, float32 [n]); the row itself is left as it was.
        Equal entries: the smaller id comes first. Returns ids and values, [min(k, limit)] each.
        With a screened head and k up to 256 the other entries are not computed.
        """

    def screening(self, k: int, *, limit: int) -> list[tuple[int, int]]:
        """Screen each row of the last feed, which had at most 512 tokens and logits "all".

        Returns for each row how many entries were computed exactly, and how many of the k largest
        among ids below `limit` were missed. Raises ArgumentError if the head is full.
        """

    def snapshot(self) -> Snapshot:
        """The exact state, to return to later. Raises MemoryLimitError."""

    def restore(self, snapshot: Snapshot) -> None: ...
    def reset(self) -> None:
        """Back to an empty timeline."""

    def start_profile(self) -> None:
        """Count the times of feeds from now on, from zero."""

    def stop_profile(self) -> dict[str, float]:
        """Seconds of the feeds since `start_profile` by part; together their wall time.

        "matrices", "delta_rule", "attention", "head", "norms" (with the quantisation of
        activations), "other" (embedding and what has no part of its own): the caller's work, and
        of work that threads share the time in it by the number of threads. "synchronisation":
        what that shared work took beyond. Raises ArgumentError if no profile was started.
        """

    def trace(self, tokens: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
        """Feed, and return the values between the layers by name; for tests and study."""

    def state(self, layer: int) -> dict[str, NDArray[np.float32]]:
        """State of one layer: "conv" [channels, kernel - 1] and "recurrent" [h_v, d_k, d_v],
        or "key" and "value" [h_kv, n_tokens, head_dim]."""

@final
class Snapshot:
    """A saved state of a session of the same model."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class Encoder:
    """Text between added tokens to ids: NFC, splitting into words, byte-level BPE. Thread safe.

    The interpreter lock is released for texts from 4096 bytes on.
    """

    @staticmethod
    def from_tokenizer_json(content: bytes) -> tuple[Encoder, list[tuple[int, str, bool, bool]]]:
        """The encoder and the added tokens of a tokenizer.json: (id, text, whether special,
        whether matched exactly). Raises FileError, or UnsupportedError for another kind."""

    @staticmethod
    def from_vocab_and_merges(
        vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str
    ) -> Encoder:
        """Merges by rank; `pattern` splits text. Raises FileError."""

    def encode(self, text: str) -> list[int]:
        """Raises FileError if the pattern of the file takes too many steps."""

    @property
    def size(self) -> int:
        """The largest id + 1."""

    def token(self, id: int) -> str | None:
        """The token `id` as the file spells it, None if there is none."""

    def tokens(self) -> dict[str, int]:
        """Ids of all tokens."""

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens that become one, by rank."""

def instruction_sets() -> list[str]:
    """Instruction sets that this machine can run, best first."""

class kernels:  # a module
    """Kernels on their own, for measurements; seconds for `repeats` runs."""

    @staticmethod
    def matmul(
        isa: str,
        format: str,
        rows: int,
        cols: int,
        tokens: int,
        repeats: int,
        ask: str = "l1",
        abreast: bool = True,
    ) -> float:
        """A random [rows, cols] matrix times `tokens` rows.

        format: bf16, f16, f32, or one of panels as docs/formats.md lists them, like w4_k.
        ask: how weights in panels are asked for ahead of their use: no, into l1 or l2, or once
        (into l1 alone). abreast: whether few tokens read four panels side by side.
        """

    @staticmethod
    def delta_rule(isa: str, heads: int, tokens: int, repeats: int, ask: str = "l1") -> float:
        """Steps of `tokens` tokens on `heads` states of 128 x 128. ask: as for `matmul`."""

    @staticmethod
    def attention(isa: str, kv: str, chunks: int, repeats: int, ask: str = "l1") -> float:
        """Passes of four queries over `chunks` chunks of 256 positions of a head of 256 dimensions.

        kv: q8 or f16. ask: as for `matmul`.
        """

    @staticmethod
    def fork_join(threads: int) -> float:
        """What handing a region to the threads and waiting for them costs beside its work; median
        of 1000 regions."""

    @staticmethod
    def limits(isa: str, threads: int) -> dict[str, float]:
        """What the machine could do at best: read_one, read_all in bytes per second, int8_peak,
        f32_peak in operations per second of one thread."""
