"""A model of the family's shape that is small enough to be made in a moment."""

import json

from qdelta import _native
from qdelta.sizes import SIZES


def small_model(quant, **changes):
    config = {
        **SIZES["0.8B"],
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "vocab_size": 4096,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        **changes,
    }
    return _native.Model.synthetic(json.dumps(config), quant=quant)
