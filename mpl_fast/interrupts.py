"""Signals as a wish to stop: the step in progress ends, a checkpoint is saved, the run leaves."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopping_by(wish: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for a checkpoint and an orderly stop, a repetition ends at
    once."""
    seen: set[int] = set()

    def handle(number: int, _: FrameType | None) -> None:
        if number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        wish()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
