"""qdelta: the Qwen3.5 small language models on laptop CPUs.

In short:

    import qdelta

    model = qdelta.load("Qwen/Qwen3.5-4B")
    print(model.generate("Once upon a time", max_tokens=64).text)
    for event in model.stream([{"role": "user", "content": "Hi"}]):
        print(event.text, end="")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ArgumentError,
    ContextError,
    Error,
    FileAccessError,
    FileError,
    MemoryLimitError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from ._native import instruction_sets
    from .keep import export, pull
    from .llm import Model
    from .loading import load
    from .planning import MemoryPlan, plan
    from .results import (
        Comparison,
        Completion,
        Event,
        Message,
        Perplexity,
        Score,
        Screening,
        Timings,
        Usage,
        WorstToken,
    )
    from .sampling import Sampling
    from .session import Session
    from .stream import AsyncStream, Stream
    from .tokenizer import TextDecoder, Tokenizer
    from .verification import Verification, verify

# Name -> module, imported at first use: numpy and the extension take longer than all the rest.
_HOMES = {
    "AsyncStream": "stream",
    "Comparison": "results",
    "Completion": "results",
    "Event": "results",
    "MemoryPlan": "planning",
    "Message": "results",
    "Model": "llm",
    "Perplexity": "results",
    "Sampling": "sampling",
    "Score": "results",
    "Screening": "results",
    "Session": "session",
    "Stream": "stream",
    "TextDecoder": "tokenizer",
    "Timings": "results",
    "Tokenizer": "tokenizer",
    "Usage": "results",
    "Verification": "verification",
    "WorstToken": "results",
    "export": "keep",
    "instruction_sets": "_native",
    "load": "loading",
    "plan": "planning",
    "pull": "keep",
    "verify": "verification",
}

__all__ = [
    "ArgumentError",
    "AsyncStream",
    "Comparison",
    "Completion",
    "ContextError",
    "Error",
    "Event",
    "FileAccessError",
    "FileError",
    "MemoryLimitError",
    "MemoryPlan",
    "Message",
    "Model",
    "Perplexity",
    "Sampling",
    "Score",
    "Screening",
    "Session",
    "Stream",
    "TextDecoder",
    "Timings",
    "Tokenizer",
    "UnsupportedError",
    "Usage",
    "Verification",
    "WorstToken",
    "__version__",
    "export",
    "instruction_sets",
    "load",
    "plan",
    "pull",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("qdelta")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
