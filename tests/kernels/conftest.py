"""Runs a test of the losses with every implementation that this process has."""

from collections.abc import Iterator

import pytest

from mpl_fast import losses
from tests.kernels.cases import INTERPRETED, LOOP

ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# Triton decides when a kernel is decorated whether it is interpreted: `test_interpreter.py` runs
# the same tests in another process.
FUSED = [pytest.param("cpu", id="interpreter")] if INTERPRETED else [ON_CUDA]
ALL = FUSED if INTERPRETED else [pytest.param("cpu", id="reference"), ON_CUDA]


@pytest.fixture(autouse=INTERPRETED)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by the block: three small ones instead of five."""
    from mpl_fast.kernels import launch

    chosen = launch.launch_config
    small = launch.Launch(16, 1)
    monkeypatch.setattr(launch, "launch_config", lambda c: small if c == LOOP else chosen(c))


@pytest.fixture(params=ALL)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of logits, whose losses are computed there by the definition or by the kernels."""
    kernels = INTERPRETED or request.param == "cuda"
    with losses.use("triton" if kernels else "reference"):
        yield request.param


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of logits, whose losses are computed by the kernels."""
    with losses.use("triton"):
        yield request.param
