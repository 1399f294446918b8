"""Compares the table, classes.txt and the splits' .idx and .lst files with each other."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mpl_fast.data.manifest import CLASSES
from mpl_fast.errors import DataError
from mpl_fast.packing.check.shard_check import Problem, file_fault, table_problem
from mpl_fast.packing.plan.table import TABLE, ShardRow, Table, open_table
from mpl_fast.packing.publish.sparse_index import padded_lines
from mpl_fast.packing.write.pool import Advance

_LINES = 1 << 14  # between two calls of advance, which stops an interrupted check
# SQLite accepts any value in any column, also one that a damaged disk has made of a number.
_WRONG_TYPES = """
SELECT id FROM records LEFT JOIN written USING (id)
WHERE typeof(name) <> 'text' OR label NOT IN (SELECT label FROM classes)
   OR (written.id IS NOT NULL AND (typeof(offset) <> 'integer' OR typeof(length) <> 'integer'
       OR typeof(written.size) <> 'integer' OR typeof(crc32) <> 'integer'))
LIMIT 1
"""


class _MisfitError(Exception):
    """The first line of a file that differs from the table."""

    def __init__(self, file: str, number: int, found: str, right: str) -> None:
        self.file = file
        self.text = f"line {number} is {found.rstrip()!r}, {right}"


def check_table(
    root: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, ShardRow], list[Problem]]:
    """Check the table and classes.txt; return the shards by file name and the problems.

    Without shards the table is damaged.
    """
    fault = file_fault(root, CLASSES, manifest["classes"]["sha256"])
    problems = [Problem(CLASSES, fault)] if fault else []
    try:
        with open_table(root / TABLE) as table:
            (state,) = next(table.query("PRAGMA quick_check(1)"))
            strange = next(table.query(_WRONG_TYPES), None)
            shards = {shard.file: shard for shard in table.shards()}
            classes = "".join(f"{name}\n" for name in table.classes())
    except DataError as error:
        return {}, [*problems, table_problem(root, error)]
    changed = file_fault(root, TABLE, manifest["table_sha256"])
    if changed:  # its rows may still be right, and locate other damage
        problems.append(Problem(TABLE, changed))
    unknown = [entry["file"] for entry in manifest["shards"] if entry["file"] not in shards]
    if state != "ok":
        damage = str(state)
    elif strange:
        damage = f"its row of record {strange[0]} holds what it cannot"
    elif unknown:
        damage = f"it lacks {unknown[0]}"
    elif not fault and classes.encode("utf-8", "surrogateescape") != (root / CLASSES).read_bytes():
        damage = f"its classes are not those of {CLASSES}"
    else:
        return shards, problems
    return {}, [*problems, Problem(TABLE, f"damaged: {damage}; pack again")]


def check_split(
    root: Path, split: Mapping[str, Any], shards: Mapping[str, ShardRow], advance: Advance
) -> list[Problem]:
    """Return the problems of the .lst and the .idx of a split, given the table's shards.

    Without shards only their checksums are compared.
    """
    faults = {
        split[kind]: file_fault(root, split[kind], split[f"{kind}_sha256"])
        for kind in ("lst", "idx")
    }
    problems = [Problem(name, fault) for name, fault in faults.items() if fault]
    if not all((root / name).is_file() for name in faults):
        return problems
    try:
        if shards:
            own = [shards[file] for file in split["shards"]]
            with open_table(root / TABLE) as table, closing(_rows(table, own)) as rows:
                _compare(root, split, rows, advance)
    except DataError as error:
        return [*problems, table_problem(root, error)]
    except _MisfitError as misfit:
        if misfit.file == split["idx"] and faults[split["lst"]]:
            return problems  # what the index should contain follows from an undamaged listing
        if not faults[misfit.file]:
            text = f"damaged: {misfit.file}, which is undamaged, does not fit it: {misfit.text}"
            return [*problems, Problem(TABLE, text)]
        others = [problem for problem in problems if problem.file != misfit.file]
        return [*others, Problem(misfit.file, f"{faults[misfit.file]}: {misfit.text}")]
    return problems


class _Row(NamedTuple):
    """A record as it is listed in the files of a split."""

    entry: tuple[int, int, int]  # of the .idx: id, file number, offset over the joined files
    line: str  # of the .lst


def _rows(table: Table, shards: Sequence[ShardRow]) -> Generator[_Row, None, None]:
    """Yield the records of a prefix in file order."""
    query = (
        "SELECT id, label, name, offset, length FROM written JOIN records USING (id) "
        "WHERE id BETWEEN ? AND ? ORDER BY id"
    )
    classes = table.classes()
    start = end = 0
    for file, shard in enumerate(shards):
        for record_id, label, name, offset, length in table.query(query, shard.ids):
            end = start + offset + length
            line = f"{record_id}\t{label}\t{classes[label]}/{name}\n"
            yield _Row((record_id, file, start + offset), line)
        start = end


def _compare(root: Path, split: Mapping[str, Any], rows: Iterator[_Row], advance: Advance) -> None:
    """Raise _MisfitError at the first wrong line of a split's files."""
    listing, index = split["lst"], split["idx"]
    with _lines(root / listing) as lst, _lines(root / index) as idx:
        wanted = padded_lines(_listed(listing, lst, rows, advance))
        for number, (line, found) in enumerate(zip_longest(wanted, idx, fillvalue=""), 1):
            if line != found:
                right = f"it should be {line.rstrip()!r}" if line else "it should not be there"
                raise _MisfitError(index, number, found, right)


def _listed(
    file: str, lines: Iterable[str], rows: Iterator[_Row], advance: Advance
) -> Iterator[tuple[int, int, int]]:
    """Yield the entries of those rows that a listing contains, in the same order."""
    for number, line in enumerate(lines, 1):
        if number % _LINES == 0:
            advance(0, 0)
        key = line.partition("\t")[0]
        wanted = int(key) if key.isdecimal() else -1
        row = next((row for row in rows if row.entry[0] >= wanted), None)
        if row is None or row.entry[0] != wanted:
            raise _MisfitError(file, number, line, "no record of these files has its place here")
        if line != row.line:
            raise _MisfitError(file, number, line, f"it should be {row.line.rstrip()!r}")
        yield row.entry


def _lines(path: Path) -> TextIO:
    return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
