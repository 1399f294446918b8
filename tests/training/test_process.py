"""A signal that arrives twice within a moment is one request to stop; a late Ctrl-C ends it."""

import contextlib
import os
import signal

import pytest

from mpl_fast.training import process


@pytest.mark.parametrize(
    ("first", "late", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, True),  # torchrun's, after a second Ctrl-C
        (signal.SIGTERM, signal.SIGTERM, False),  # a scheduler's, before it kills
    ],
)
def test_an_echo_is_the_same_request_and_a_late_repetition_ends(
    first: signal.Signals, late: signal.Signals, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1.0]
    monkeypatch.setattr("mpl_fast.training.process.time.monotonic", lambda: clock[0])
    requests: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with process.stop_on_signal(lambda: requests.append(1)):
        os.kill(os.getpid(), first)
        clock[0] = 2.0
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), late)
        assert requests
        clock[0] = 11.0
        with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext():
            os.kill(os.getpid(), late)
    assert signal.getsignal(signal.SIGTERM) == before
