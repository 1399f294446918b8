"""How far a long command is: one updating line on a terminal, else a plain line now and then."""

import time
from typing import TextIO

_TERMINAL_INTERVAL = 0.2  # seconds
_PLAIN_INTERVAL = 5.0  # seconds


class Progress:
    """Writes images, images/s, MB/s and the time left to a stream, not more often than useful."""

    def __init__(self, verb: str, images: int, size: int, stream: TextIO) -> None:
        self._verb = verb  # past tense: packed, verified
        self._images = images
        self._size = size
        self._stream = stream
        self._terminal = stream.isatty()
        self._interval = _TERMINAL_INTERVAL if self._terminal else _PLAIN_INTERVAL
        self._start = self._last = time.monotonic()

    def update(self, images: int, size: int) -> None:
        """Tell of `images` images and `size` bytes done, when the last line is old enough."""
        now = time.monotonic()
        if now - self._last < self._interval or not images:
            return
        self._last = now
        seconds = now - self._start
        left = seconds * (self._size - size) / max(size, 1)
        line = (
            f"{self._verb} {images}/{self._images} images, {images / seconds:.0f} images/s, "
            f"{size / seconds / 1e6:.1f} MB/s, {left:.0f} s left"
        )
        # \x1b[K clears what a longer line before left behind.
        end = "\x1b[K\r" if self._terminal else "\n"
        print(line, end=end, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal's line empty for what comes next."""
        if self._terminal:
            print("\x1b[K", end="", file=self._stream, flush=True)
