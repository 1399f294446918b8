"""The table, classes.txt and the splits' .idx and .lst files, against each other."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mpl_fast.data.manifest import CLASSES
from mpl_fast.errors import DataError
from mpl_fast.packing.record_check import Advance
from mpl_fast.packing.shard import StoppedError
from mpl_fast.packing.shard_check import Problem, file_fault, table_problem
from mpl_fast.packing.sparse_index import padded
from mpl_fast.packing.table import TABLE, ShardRow, Table, reading

_LOOK = 1 << 14  # lines between two looks at whether to stop


class _MisfitError(Exception):
    """The first line of a file that is not as the table has it."""

    def __init__(self, file: str, number: int, found: str, wanted: str) -> None:
        self.file = file
        self.text = f"line {number} is {found.rstrip()!r}, it should be {wanted.rstrip()!r}"


def check_table(
    root: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, ShardRow], list[Problem]]:
    """Return the table's shards by file name, none when it is damaged, and what is wrong.

    classes.txt is checked too.
    """
    fault = file_fault(root, CLASSES, manifest["classes"]["sha256"])
    problems = [Problem(CLASSES, fault)] if fault else []
    try:
        with reading(root / TABLE) as table:
            (state,) = next(table.query("PRAGMA quick_check(1)"))
            shards = {shard.file: shard for shard in table.shards()}
            classes = "".join(f"{name}\n" for name in table.classes())
    except DataError as error:
        return {}, [*problems, table_problem(root, error)]
    unknown = [entry["file"] for entry in manifest["shards"] if entry["file"] not in shards]
    if state != "ok":
        damage = str(state)
    elif unknown:
        damage = f"it does not know {unknown[0]}"
    elif not fault and classes.encode("utf-8", "surrogateescape") != (root / CLASSES).read_bytes():
        damage = f"its classes are not those of {CLASSES}"
    else:
        return shards, problems
    return {}, [*problems, Problem(TABLE, f"damaged: {damage}; pack again")]


def check_split(
    root: Path, split: Mapping[str, Any], shards: Mapping[str, ShardRow], advance: Advance
) -> list[Problem]:
    """Return what is wrong with the .lst and the .idx of a split, given the table's shards.

    With no shards only their checksums are looked at.
    """

    def go_on() -> None:
        if not advance(0, 0):
            raise StoppedError

    faults = {
        split[kind]: file_fault(root, split[kind], split[f"{kind}_sha256"])
        for kind in ("lst", "idx")
    }
    problems = [Problem(name, fault) for name, fault in faults.items() if fault]
    if not all((root / name).is_file() for name in faults):
        return problems
    try:
        if shards:
            with reading(root / TABLE) as table:
                own = [shards[file] for file in split["shards"]]
                _compare(root, split, _Rows(table, own), go_on)
    except DataError as error:
        return [*problems, table_problem(root, error)]
    except _MisfitError as misfit:
        if not faults[misfit.file]:
            text = f"damaged: {misfit.file}, which is sound, does not fit it: {misfit.text}"
            return [*problems, Problem(TABLE, text)]
        others = [problem for problem in problems if problem.file != misfit.file]
        return [*others, Problem(misfit.file, f"{faults[misfit.file]}: {misfit.text}")]
    return problems


class _Row(NamedTuple):
    """A record as the files of a split have it."""

    entry: tuple[int, int, int]  # of the .idx: id, file number, offset over the joined files
    line: str  # of the .lst


class _Rows:
    """What the table knows of the records of a prefix, in file order."""

    def __init__(self, table: Table, shards: Sequence[ShardRow]) -> None:
        self._table, self._shards = table, shards
        self._classes = table.classes()

    def __iter__(self) -> Iterator[_Row]:
        query = (
            "SELECT id, label, name, offset, length FROM written JOIN records USING (id) "
            "WHERE id BETWEEN ? AND ? ORDER BY id"
        )
        start = end = 0
        for file, shard in enumerate(self._shards):
            last = shard.first_id + shard.records - 1
            rows = self._table.query(query, (shard.first_id, last))
            for record_id, label, name, offset, length in rows:
                end = start + offset + length
                line = f"{record_id}\t{label}\t{self._classes[label]}/{name}\n"
                yield _Row((record_id, file, start + offset), line)
            start = end


def _compare(root: Path, split: Mapping[str, Any], rows: _Rows, go_on: Callable[[], None]) -> None:
    """Return when every line of a split's files is right, else raise _MisfitError."""
    listing, index = split["lst"], split["idx"]
    with _lines(root / listing) as lst, _lines(root / index) as idx:
        wanted = padded(_listed(listing, lst, rows, go_on))
        for number, (line, found) in enumerate(zip_longest(wanted, idx, fillvalue=""), 1):
            if line != found:
                raise _MisfitError(index, number, found, line)


def _listed(
    file: str, lines: Iterable[str], rows: _Rows, go_on: Callable[[], None]
) -> Iterator[tuple[int, int, int]]:
    """Yield the entries of those rows that a listing has, in the same order."""
    remaining = iter(rows)
    for number, line in enumerate(lines, 1):
        if number % _LOOK == 0:
            go_on()
        key = line.partition("\t")[0]
        wanted = int(key) if key.isdecimal() else -1
        row = next((row for row in remaining if row.entry[0] >= wanted), None)
        if row is None or line != row.line:
            raise _MisfitError(file, number, line, row.line if row else "")
        yield row.entry


def _lines(path: Path) -> TextIO:
    return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
