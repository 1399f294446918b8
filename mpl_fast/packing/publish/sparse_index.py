"""Index files that DALI reads right although they list only some of the records of several files.

DALI sorts the offsets and walks along the files with a cursor that moves on by at most one file a
line, and not at all on the last line (recordio_loader.h of DALI 2.4). So it looks into the wrong
file when a file has no listed record. A line that is repeated gives no second record but moves the
cursor, which is how the lines of a sparse index are padded here.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from mpl_fast.errors import DataError


class Place(NamedTuple):
    """Where DALI looks for a record."""

    file: int
    offset: int  # in that file; beyond its end when DALI looks into the wrong file
    size: int  # bytes up to the next record of the index, or to the end of the last file


def padded(entries: Iterable[tuple[int, int, int]]) -> Iterator[str]:
    """Yield the lines `id TAB offset` of an index, repeated where DALI's cursor needs it.

    entries are (record id, file number, offset over the joined files) in the order of the offsets.
    An index of one file, or one that lists a record of every file, gets one line a record, but for
    a last record that is alone in its file.
    """
    cursor = 0
    waiting: tuple[int, int, int] | None = None
    for entry in entries:
        if waiting:
            record_id, file, offset = waiting
            line = f"{record_id}\t{offset}\n"
            yield line
            for _ in range(file - cursor - 1):
                yield line
            cursor = file
        waiting = entry
    if waiting:
        record_id, file, offset = waiting
        for _ in range(1 + file - cursor):
            yield f"{record_id}\t{offset}\n"


def places(offsets: Iterable[int], sizes: Sequence[int]) -> Iterator[Place]:
    """Yield where DALI looks for each record of an index, given its offsets in ascending order.

    sizes are the bytes of the joined files.
    """
    starts = [0, *accumulate(sizes)]
    file = 0
    previous: int | None = None
    for offset in offsets:
        if previous is not None:
            if file + 1 < len(sizes) and previous >= starts[file + 1]:
                file += 1
            if offset > previous:
                yield Place(file, previous - starts[file], offset - previous)
        previous = offset
    if previous is not None:
        yield Place(file, previous - starts[file], starts[-1] - previous)


def check_index(lines: Iterable[str], sizes: Sequence[int], name: str) -> int:
    """Return how many records DALI reads by an index, each from the file that holds it.

    sizes are the bytes of the joined files. DataError names the index (name) when a line is no
    line of an index, an offset is out of order or of range, or DALI would look into a wrong file.
    """
    records = 0
    for place in places(_offsets(lines, sum(sizes), name), sizes):
        if place.offset >= sizes[place.file]:
            raise DataError(
                f"{name}: DALI would look for its record {records + 1} in the wrong file (number "
                f"{place.file}, beyond its end); the lines lack padding"
            )
        records += 1
    return records


def _offsets(lines: Iterable[str], total: int, name: str) -> Iterator[int]:
    previous = 0
    for number, line in enumerate(lines, 1):
        key, _, text = line.rstrip("\n").partition("\t")
        if not (key.isdecimal() and text.isdecimal()):
            raise DataError(f"{name}:{number}: {line.rstrip()!r} is not `id TAB offset`")
        offset = int(text)
        if not previous <= offset < total:
            raise DataError(
                f"{name}:{number}: offset {offset} is not between {previous} (the line before) "
                f"and {total} (bytes of the .rec files)"
            )
        yield offset
        previous = offset
