"""How far the benchmark is: whether there is time for more, what was left out, and the JSON."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]
FIRST_GUESS = 20.0  # seconds that a kind of work may take, before one of its kind was seen


class Progress:
    """A result that grows until the deadline, and is saved as it grows."""

    def __init__(self, result: Json, deadline: float, save: Callable[[], None]) -> None:
        self.result, self.deadline, self.save = result, deadline, save
        self._longest: dict[str, float] = {}

    def allows(self, what: str, kind: str) -> bool:
        """Whether work of this kind would still end in time; notes what is left out."""
        if time.monotonic() + self._longest.get(kind, FIRST_GUESS) < self.deadline:
            say(what)
            return True
        self.result["skipped"].append(f"no time: {what}")
        return False

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Remembers how long work of this kind may take; saves what it came to."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - began)
            self.save()


def write_json(result: Json, file: Path) -> None:
    """All or nothing, also if the power fails; what JSON cannot say, such as NaN, as text."""
    aside = file.with_name(file.name + ".tmp")
    with aside.open("w") as stream:
        stream.write(json.dumps(_sayable(result), indent=1, default=str, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def say(text: str) -> None:
    """A line for who is waiting."""
    print(f"bench_kernels: {text}", file=sys.stderr, flush=True)


def _sayable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _sayable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sayable(one) for one in value]
    return value
