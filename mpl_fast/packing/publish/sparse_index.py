"""Index files that list only some records of several files, in the form that DALI reads correctly.

DALI sorts the offsets and follows the files with a cursor that advances by at most one file per
line, and not on the last line (recordio_loader.h of DALI 2.4). So it reads from the wrong file when
a file has no listed record. A repeated line gives no second record but advances the cursor: such
lines pad a sparse index here.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, repeat

from mpl_fast.errors import DataError


class Padding:
    """Repeats lines of an index as DALI's cursor needs it.

    If every file has a listed record, each record gets one line, except a last record that is
    alone in its file.
    """

    def __init__(self) -> None:
        self._file = 0  # the cursor
        self._alone = b""  # the line of the last record if the cursor had to advance for it

    def padded(self, file: int, lines: Sequence[bytes]) -> Sequence[bytes]:
        """Return the lines of consecutive records of a file, of which the first may be repeated."""
        step, self._file = file - self._file, file
        self._alone = lines[0] if step and len(lines) == 1 else b""
        return [*repeat(lines[0], step - 1), *lines]

    def end(self) -> bytes:
        """Return what is behind the last line."""
        return self._alone


def padded_lines(entries: Iterable[tuple[int, int, int]]) -> Iterator[str]:
    """Yield the lines `id TAB offset` of an index, repeated as DALI's cursor needs them.

    entries are (record id, file number, offset over the joined files) in the order of the offsets.
    """
    padding = Padding()
    for record_id, file, offset in entries:
        for line in padding.padded(file, (b"%d\t%d\n" % (record_id, offset),)):
            yield line.decode()
    if last := padding.end():
        yield last.decode()


def dali_positions(offsets: Iterable[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the file, and the offset in it, where DALI reads each record of an index.

    offsets are those of the index in ascending order, sizes the bytes of the joined files. An
    offset is beyond the end of its file if DALI reads from the wrong one.
    """
    starts = [0, *accumulate(sizes)]
    file = 0
    previous: int | None = None
    for offset in offsets:
        if previous is not None:
            if file + 1 < len(sizes) and previous >= starts[file + 1]:
                file += 1
            if offset > previous:
                yield file, previous - starts[file]
        previous = offset
    if previous is not None:
        yield file, previous - starts[file]


def check_index(lines: Iterable[str], sizes: Sequence[int], name: str) -> int:
    """Return the number of records that DALI reads by an index, each from the right file.

    sizes are the bytes of the joined files. Raises DataError with the index's name when a line is
    malformed, an offset is out of order or range, or DALI would read from a wrong file.
    """
    records = 0
    for file, offset in dali_positions(_offsets(lines, sum(sizes), name), sizes):
        if offset >= sizes[file]:
            raise DataError(
                f"{name}: DALI would read its record {records + 1} from the wrong file (number "
                f"{file}, beyond its end); the lines lack padding"
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
