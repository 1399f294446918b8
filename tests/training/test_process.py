"""A signal that arrives twice within a moment is one request to stop; a later one ends at once."""

import os
import signal

import pytest

from mpl_fast.training import process


def test_an_echo_is_the_same_request_and_a_late_repetition_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mpl_fast.training.process.time.monotonic", lambda: clock[0])
    requests: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with process.stop_on_signal(lambda: requests.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] = 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests
        clock[0] = 10.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
