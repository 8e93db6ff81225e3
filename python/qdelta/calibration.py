"""How much each column of a matrix matters: the mean square of its input over a text.

The error that rounding a matrix W to V adds to its output W x is, in the mean over inputs x whose
entries are taken as independent, sum over rows and columns j of (W - V)^2 E[x_j^2]. Conversion that
knows E[x_j^2] rounds so that this is least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import _native, recipes
from .errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens that see each other, and how many of them are traced at a time: a trace keeps all values
# between the layers.
_WINDOW = 512
_PIECE = 64
# Added to the importance of each column, as a part of the mean, so that none counts for nothing.
_FLOOR = 1e-3

# The traced value that each matrix of a layer reads.
_INPUTS = {
    "linear_attn.in_proj_qkv": "input_layernorm",
    "linear_attn.in_proj_z": "input_layernorm",
    "linear_attn.in_proj_a": "input_layernorm",
    "linear_attn.in_proj_b": "input_layernorm",
    "linear_attn.out_proj": "gated_norm",
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "attn_gated",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp_hidden",
}


def importance(
    source: _native.Checkpoint,
    model: _native.Model,
    tokens: NDArray[np.int32],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Importance of the columns of each matrix of `source`, whose text model is `model`.

    tokens: int32 [n], read in windows of 512 that do not see each other. progress: called with
    (tokens done, in all). The embedding counts as the head. Matrices of the multi-token-prediction
    module are left out. Raises ArgumentError for an empty text.
    """
    if not len(tokens):
        raise ArgumentError("text to calibrate with: empty")
    sums: dict[str, NDArray[np.float64]] = {}
    wanted = {"final_norm", *_INPUTS.values()}
    session = model.session()
    for start in range(0, len(tokens), _WINDOW):
        session.reset()
        window = tokens[start : start + _WINDOW]
        for first in range(0, len(window), _PIECE):
            values = session.trace(window[first : first + _PIECE])
            for name, value in values.items():
                if name.rsplit(".", 1)[-1] in wanted:
                    square = np.einsum("ij,ij->j", value, value, dtype=np.float64)
                    sums[name] = sums.get(name, np.float64(0.0)) + square
            if progress is not None:
                progress(min(start + first + _PIECE, len(tokens)), len(tokens))
    found = {}
    for name, _, _ in source.matrices():
        read = _input_of(name.removesuffix(".weight"))
        if read is not None:
            mean = sums[read] / len(tokens)
            floor = _FLOOR * mean.mean() or 1.0
            found[name] = (mean + floor).astype(np.float32)
    return found


def losses(
    source: _native.Checkpoint,
    converted: _native.Checkpoint,
    importance: dict[str, NDArray[np.float32]],
) -> list[tuple[str, str, float]]:
    """(matrix, format, loss) of what `converted` holds of the matrices of `source`, most first.

    The loss is the part of the power of a matrix's output, for the text of `importance`, that its
    rounding is; see `_native.losses`. Matrices without importance, or in no panels, are left out.
    """
    formats: dict[str, str] = {}
    for name, *_ in converted.tensors():
        stem, _, format = name.rpartition(".")
        formats[f"{stem}.weight"] = format
    used = {formats[name] for name in importance if name in formats} & set(recipes.FORMATS)
    found = [
        (name.removesuffix(".weight"), format, loss)
        for name, format, _, loss in _native.losses(source, sorted(used), importance)
        if name in importance and formats.get(name) == format
    ]
    return sorted(found, key=lambda entry: -entry[2])


def _input_of(matrix: str) -> str | None:
    """The traced value that a matrix reads, None if it is no part of the text model's layers."""
    if matrix in ("embed_tokens", "lm_head"):
        return "final_norm"
    if not matrix.startswith("layers."):
        return None
    _, layer, part = matrix.split(".", 2)
    return f"layer.{layer}.{_INPUTS[part]}"
