"""Runs a test of the losses with every implementation that this process has."""

from collections.abc import Iterator

import pytest

from mpl_fast import losses
from tests.kernels.cases import CUDA, INTERPRETED, INTERPRETER, REFERENCE, Backend

ON_CUDA = pytest.param(CUDA, marks=pytest.mark.gpu, id=CUDA.name)
# Triton decides when a kernel is decorated whether it is interpreted: `test_interpreter.py` runs
# the same tests in another process.
FUSED = [pytest.param(INTERPRETER, id=INTERPRETER.name)] if INTERPRETED else [ON_CUDA]
ALL = FUSED if INTERPRETED else [pytest.param(REFERENCE, id=REFERENCE.name), ON_CUDA]


def _used(backend: Backend) -> Iterator[Backend]:
    with losses.use("reference" if backend == REFERENCE else "triton"):
        yield backend


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The losses inside are computed by this, the definition or the kernels."""
    yield from _used(request.param)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The losses inside are computed by the kernels."""
    yield from _used(request.param)
