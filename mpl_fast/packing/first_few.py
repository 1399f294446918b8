"""Shortens lists for one-line messages: their first entries and the number of others."""

from bisect import insort
from collections.abc import Iterable


def first_few(entries: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """Return the first `most` entries joined by `between`, and the number of those left out."""
    listed = list(entries)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return between.join(listed[:most]) + more


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
