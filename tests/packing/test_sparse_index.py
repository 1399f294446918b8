"""The padding of sparse indexes, compared with the file cursor of DALI's reader."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast.errors import DataError
from mpl_fast.packing.publish.sparse_index import check_index, dali_positions, padded_lines

Entries = list[tuple[int, int, int]]


@st.composite
def listings(draw: st.DrawFn) -> tuple[Entries, list[int]]:
    """Some records of up to 8 files of up to 4 records each, and the sizes of the files."""
    lengths = draw(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8)
    )
    flat = [(file, length) for file, record in enumerate(lengths) for length in record]
    starts = [0, *accumulate(length for _, length in flat)]
    chosen = draw(st.sets(st.integers(0, len(flat) - 1), min_size=1))
    entries = [(100 + at, flat[at][0], starts[at]) for at in sorted(chosen)]
    return entries, [sum(record) for record in lengths]


def right_places(entries: Entries, sizes: list[int]) -> list[tuple[int, int]]:
    """Return (file, offset in that file) of each entry."""
    starts = [0, *accumulate(sizes)]
    return [(file, offset - starts[file]) for _, file, offset in entries]


def found_places(lines: list[str], sizes: list[int]) -> list[tuple[int, int]]:
    """Return (file, offset in that file) at which DALI reads the record of each line."""
    return list(dali_positions((int(line.split("\t")[1]) for line in lines), sizes))


@given(listings())
def test_padded_index(listing: tuple[Entries, list[int]]) -> None:
    entries, sizes = listing
    lines = list(padded_lines(entries))
    assert found_places(lines, sizes) == right_places(entries, sizes)
    assert check_index(lines, sizes, "x.idx") == len(entries)
    plain = [f"{number}\t{offset}\n" for number, _, offset in entries]
    assert list(dict.fromkeys(lines)) == plain
    # Without padding, the check fails exactly where DALI would read a wrong record.
    if found_places(plain, sizes) == right_places(entries, sizes):
        assert check_index(plain, sizes, "x.idx") == len(entries)
    else:
        with pytest.raises(DataError, match=r"^x\.idx: DALI would read its record \d+ from the"):
            check_index(plain, sizes, "x.idx")


def test_lines_are_repeated_by_the_rule() -> None:
    """Files begin at 0, 10, 20, 30. The last line is repeated once more than the others."""
    first, second, third = "1\t0\n", "2\t25\n", "3\t35\n"
    lines = [first, *[second] * 2, *[third] * 2]
    assert list(padded_lines([(1, 0, 0), (2, 2, 25), (3, 3, 35)])) == lines
    assert list(padded_lines([(2, 2, 25)])) == [second] * 3
    assert list(padded_lines([(1, 0, 0), (5, 0, 5)])) == [first, "5\t5\n"]
    assert list(padded_lines([])) == []


def test_positions_of_an_unpadded_index() -> None:
    """Without padding, the cursor moves by at most one file a line, and not for the last line."""
    assert list(dali_positions([5, 25, 35], [10, 10, 10, 10])) == [(0, 5), (1, 15), (1, 25)]
    assert list(dali_positions([], [10])) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1\t0\n", "x\t5\n"], "x.idx:2: 'x\\\\t5' is not `id TAB offset`"),
        (["1 0\n"], "x.idx:1: '1 0' is not `id TAB offset`"),
        (["1\t6\n", "2\t5\n"], "x.idx:2: offset 5 is not between 6 .* and 20 "),
        (["1\t20\n"], "x.idx:1: offset 20 is not between 0 .* and 20 "),
    ],
)
def test_damaged_lines(lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_index(lines, [10, 10], "x.idx")
