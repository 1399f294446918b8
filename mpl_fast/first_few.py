"""Lists and counts in one-line messages."""

from bisect import insort
from collections.abc import Iterable


def first_few(entries: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """Return the first `most` entries joined by `between`, and the number of those left out."""
    listed = list(entries)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return between.join(listed[:most]) + more


def counted(count: int, one: str, many: str = "") -> str:
    """Return the count with its noun; `many` where the plural is not `one` with an s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


class Tally:
    """Counts entries and keeps only the first few in sorted order, for messages."""

    def __init__(self, most: int = 10) -> None:
        self.count = 0
        self._most = most
        self._first: list[str] = []

    def add(self, entry: str) -> None:
        """Count an entry."""
        self.count += 1
        insort(self._first, entry)
        del self._first[self._most :]

    def __str__(self) -> str:
        more = self.count - len(self._first)
        return ", ".join(self._first) + (f" and {more} more" if more else "")
