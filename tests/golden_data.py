"""Access to the stored values under tests/golden, and the comparison all tests use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
OPS = GOLDEN / "ops"
TEXT = GOLDEN / "tiny-text"
DEMO = GOLDEN / "tiny-model-reference"
MODELS = sorted(p.name.removesuffix("-golden") for p in TEXT.glob("*-golden"))


class Tensors(dict):
    """The arrays of a file, or those below a name; remembers which were looked at."""

    def __init__(self, arrays: dict[str, np.ndarray], prefix: str = "", used: set | None = None):
        super().__init__(arrays)
        self.prefix, self.used = prefix, set() if used is None else used

    @staticmethod
    def load(path: Path) -> Tensors:
        return Tensors(load_file(path))

    def __getitem__(self, name: str) -> np.ndarray:
        self.used.add(self.prefix + name)
        return super().__getitem__(name)

    def get(self, name: str, default=None):
        self.used.add(self.prefix + name)
        return super().get(name, default)

    def under(self, name: str) -> Tensors:
        """The arrays called `name`.something, as something; all of them for an empty name."""
        dot = name + "." if name else ""
        below = {k.removeprefix(dot): v for k, v in self.items() if k.startswith(dot)}
        return Tensors(below, self.prefix + dot, self.used)

    def assert_all_used(self) -> None:
        """A stored value that no test looks at is a test that is missing."""
        assert set(self) <= self.used, f"not compared: {sorted(set(self) - self.used)}"


def cases(tensors: Tensors, part: str, within: str = "") -> Iterator[tuple[str, Tensors]]:
    """Every name that has an array `part` below it, and what is below it.

    A file with one case may leave its name out; it is then the empty one.
    """
    for key in list(tensors):
        name = key.removesuffix(part)
        if key.endswith(part) and (not name or name.endswith(".")):
            name = name.removesuffix(".")
            if not within or name.startswith(within + "."):
                yield name, tensors.under(name)


def prompts(model: GoldenModel) -> Iterator[tuple[str, Tensors]]:
    """The prompts of a model, shortest first.

    Each has "input_ids", "logits" (of the tokens "rows", if that is there, else of all),
    "greedy_ids", "greedy_margin", and perhaps "greedy_logits".
    """
    found = list(cases(model.logits, "input_ids"))
    assert found
    yield from sorted(found, key=lambda case: len(case[1]["input_ids"]))


@dataclass
class GoldenModel:
    """A tiny checkpoint and what is known of it."""

    name: str
    folder: Path
    logits: Tensors
    trace: Tensors
    states: Tensors
    chunked: Tensors


def golden_model(name: str) -> GoldenModel:
    stored = TEXT / f"{name}-golden"
    parts = ("logits", "trace", "states", "chunked")
    tensors = {part: Tensors.load(stored / f"{part}.safetensors") for part in parts}
    return GoldenModel(name, TEXT / name, **tensors)


def assert_close(got: np.ndarray, want: np.ndarray, relative: float, what: str) -> None:
    """Each entry within `relative` of the largest entry of `want`; NaN is never close."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    bound = relative * np.abs(want).max(initial=0) + 1e-30
    error = np.abs(got.astype(np.float64) - want)
    if not np.all(error <= bound):
        at = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        place = [int(i) for i in at]
        raise AssertionError(f"{what} at {place}: got {got[at]}, want {want[at]}, bound {bound}")
