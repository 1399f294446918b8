"""Signals as a wish to stop: the step in progress ends, a checkpoint is saved, the run leaves."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_SECONDS = 5.0  # a launcher and a scheduler may both pass on what is one request


@contextmanager
def stopping_by(wish: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or SIGINT makes the wish; one of `ECHO_SECONDS` later ends at once."""
    first: list[float] = []

    def handle(_: int, __: FrameType | None) -> None:
        now = time.monotonic()
        if first and now - first[0] > ECHO_SECONDS:
            raise KeyboardInterrupt
        first.append(now)
        wish()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
