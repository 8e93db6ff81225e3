"""What a region of several threads costs beside its work; seconds in `extra_info`."""

import pytest

from qdelta import _native


@pytest.mark.parametrize("threads", [1, 2, 4])
def bench_fork_join(benchmark, threads):
    seconds = benchmark(_native.kernels.fork_join, threads)
    benchmark.extra_info["seconds_per_region"] = seconds
    assert seconds >= 0
