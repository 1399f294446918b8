"""Settings of the tests of tools."""

import sys

import pytest


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a machine take seconds to measure: in tests, only that they can be."""
    if harness := sys.modules.get("tools.bench.harness"):
        limits = harness.Limits
        monkeypatch.setattr(
            harness, "Limits", lambda folder, device, small: limits(folder, device, small=True)
        )
