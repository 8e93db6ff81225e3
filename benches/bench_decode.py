"""A whole decode step of a small model."""

import numpy as np
import pytest
from small import small_model


@pytest.mark.parametrize("quant", ["w4", "w8", "none"])
def bench_decode(benchmark, quant):
    session = small_model(quant).session()
    token = np.array([1], np.int32)

    def step():
        if session.n_tokens > 4096:
            session.reset()
        session.feed(token)

    benchmark(step)
    assert np.isfinite(session.logits()).all()
