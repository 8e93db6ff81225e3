"""Attention of one thread: four queries over the cached positions of one head of 256 dimensions."""

import pytest

from qdelta import _native


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("kv", ["q8", "f16"])
@pytest.mark.parametrize("chunks", [1, 16])
def bench_attention(benchmark, isa, kv, chunks):
    seconds = benchmark(_native.kernels.attention, isa, kv, chunks, 1)
    assert seconds > 0
