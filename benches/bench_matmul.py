"""Matrix products of one thread: each format, one token (decode) and many (prefill)."""

import pytest

from qdelta import _native


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("form", ["w4", "w8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 4, 64])
def bench_matmul(benchmark, isa, form, tokens):
    seconds = benchmark(_native.kernels.matmul, isa, form, 1024, 1024, tokens, 1)
    assert seconds > 0
