"""A prompt of 512 tokens through a small model."""

import numpy as np
import pytest
from small import small_model


@pytest.mark.parametrize("quant", ["w4", "w8", "none"])
def bench_prefill(benchmark, quant):
    session = small_model(quant).session()
    prompt = np.arange(512, dtype=np.int32)

    def read():
        session.reset()
        session.feed(prompt)

    benchmark(read)
    assert session.n_tokens == 512
    assert np.isfinite(session.logits()).all()
