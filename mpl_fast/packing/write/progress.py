"""Progress of a long command: one line that is updated on a terminal, else a line now and then."""

import time
from typing import TextIO

_TERMINAL_INTERVAL = 0.2  # seconds
_PLAIN_INTERVAL = 5.0  # seconds


class Progress:
    """Context manager that prints images done, images/s, MB/s and the time left to a stream.

    Without sizes (0) there is no MB/s, and the time left is computed from the images.
    """

    def __init__(self, verb: str, images: int, size: int, stream: TextIO | None) -> None:
        self._verb = verb  # past tense: packed, verified
        self._images = images
        self._size = size  # bytes; 0: not counted
        self._stream = stream  # None: print nothing
        self._terminal = stream is not None and stream.isatty()
        self._interval = _TERMINAL_INTERVAL if self._terminal else _PLAIN_INTERVAL
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._terminal:  # leave an empty line for what is printed next
            print("\x1b[K", end="", file=self._stream, flush=True)

    def update(self, images: int, size: int = 0) -> None:
        """Print the images and bytes done, if the last line is old enough."""
        now = time.monotonic()
        done, whole = (size, self._size) if self._size else (images, self._images)
        if self._stream is None or now - self._last < self._interval or not done:
            return
        self._last = now
        seconds = now - self._start
        left = seconds * (whole - done) / done
        rate = f"{size / seconds / 1e6:.1f} MB/s, " if self._size else ""
        line = (
            f"{self._verb} {images}/{self._images} images, {images / seconds:.0f} images/s, "
            f"{rate}{left:.0f} s left"
        )
        # \x1b[K clears the rest of a longer line before.
        end = "\x1b[K\r" if self._terminal else "\n"
        print(line, end=end, file=self._stream, flush=True)
