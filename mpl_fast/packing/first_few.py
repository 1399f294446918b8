"""Shortens a list for a one-line message: its first entries and the number of others."""

from collections.abc import Iterable


def first_few(entries: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """Return the first `most` entries joined by `between`, and the number of those left out."""
    listed = list(entries)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return between.join(listed[:most]) + more
