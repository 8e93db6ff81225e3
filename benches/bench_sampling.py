"""The choice of one token at the full vocabulary; penalties weigh 1000 tokens before it."""

import numpy as np
import pytest
from small import small_model

from qdelta import Sampling
from qdelta.sampling import Sampler

VOCAB = 248_320  # rows of the head; ids from TEXTLESS on pad it
TEXTLESS = 248_077

SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "thinking": Sampling(temperature=1.0, top_k=20, top_p=0.95, presence_penalty=1.5, seed=1),
    "no-top-k": Sampling(temperature=1.0, top_k=0, top_p=0.95, seed=1),
}


@pytest.fixture(scope="module")
def session():
    session = small_model("w8", vocab_size=VOCAB).session()
    session.feed(np.array([1], np.int32))
    return session


@pytest.mark.parametrize("name", SAMPLINGS)
def bench_sampling(benchmark, session, name):
    sampler = Sampler(SAMPLINGS[name], limit=TEXTLESS)
    for _ in range(1000 if SAMPLINGS[name].presence_penalty else 0):
        sampler.choose(session)
    token = benchmark(sampler.choose, session)
    assert 0 <= token < TEXTLESS
