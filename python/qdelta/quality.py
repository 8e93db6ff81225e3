"""Comparisons of models with a reference as rows: to keep as JSON, to print, to draw."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import build, read_entries
from .sizes import name_of, parameters

if TYPE_CHECKING:
    from .llm import Model
    from .results import Comparison

COMMAND = "qdelta eval --against ... --json"


@dataclass(slots=True)
class Quality:
    """A comparison with what was compared; the sizes are those of the text model."""

    model: str
    model_type: str  # the released size, or the number of parameters
    quant: str
    weight_bytes: int
    bits_per_weight: float
    against: str
    against_quant: str
    window: int
    scored: int
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    median_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    same_top: float
    tokens_per_s: float
    worst: list[dict[str, Any]]  # `WorstToken`s


def quality(
    found: Comparison, window: int, model: tuple[str, Model], against: tuple[str, Model]
) -> Quality:
    """The row of a comparison. model, against: what a user called them, and what they are."""
    (name, loaded), (against_name, against_loaded) = model, against
    size = loaded.native.memory_plan(1).weights
    return Quality(
        model=name,
        model_type=name_of(loaded.config),
        quant=loaded.native.quant,
        weight_bytes=size,
        bits_per_weight=8 * size / parameters(loaded.config),
        against=against_name,
        against_quant=against_loaded.native.quant,
        window=window,
        scored=found.scored,
        perplexity=found.perplexity.perplexity,
        reference_perplexity=found.reference.perplexity,
        mean_kl=found.mean_kl,
        median_kl=found.median_kl,
        p99_kl=found.p99_kl,
        p999_kl=found.p999_kl,
        max_kl=found.max_kl,
        same_top=found.same_top,
        tokens_per_s=found.timings.prefill_tokens_per_s,
        worst=[asdict(token) for token in found.worst],
    )


def read_qualities(path: str | Path) -> list[Quality]:
    """Rows that `qdelta eval --against` wrote with --json.

    Raises FileAccessError, or FileError naming the entry if they are something else.
    """
    entries = enumerate(read_entries(path, COMMAND))
    return [build(Quality, entry, f"{path}: entry {i}", COMMAND) for i, entry in entries]
