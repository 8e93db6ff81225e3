"""The gated delta rule of one thread on 16 heads of 128 x 128: one token, and a chunk."""

import pytest

from qdelta import _native


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("tokens", [1, 4, 32])
def bench_delta_rule(benchmark, isa, tokens):
    seconds = benchmark(_native.kernels.delta_rule, isa, 16, tokens, 1)
    assert seconds > 0
