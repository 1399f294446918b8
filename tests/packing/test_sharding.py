"""Shards of about equal size, none empty, and the digests that detect a change of a plan."""

import bisect
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.sharding import (
    plan_digest,
    shard_digests,
    shard_file,
    shard_starts,
)
from mpl_fast.packing.plan.table import RecordRow, create_table, open_table
from tests.packing.made_sources import MadeSource, images_of, plan_of
from tests.packing.packs import KEEP

ROW = RecordRow(3, 1, 0, "a.jpg", 0, "ant/a.jpg", -1, 10, 7)


def cut(sizes: list[int], shards: int) -> list[int]:
    """Return the shard of each record."""
    starts = shard_starts(((size,) for size in sizes), len(sizes), sum(sizes), shards)
    return [bisect.bisect(starts, at) - 1 for at in range(len(sizes))]


def test_names() -> None:
    assert shard_file("train", 0, 1) == "train.rec"
    assert shard_file("train", 7, 12) == "train-00007-of-00012.rec"
    assert shard_file("val", 123456, 200000) == "val-123456-of-200000.rec"
    assert digest_of(ROW, file="other")[1] != CONTENT


@pytest.mark.parametrize(
    ("sizes", "shards", "expected"),
    [
        ([5] * 6, 3, [0, 0, 1, 1, 2, 2]),
        ([5] * 3, 3, [0, 1, 2]),
        ([1, 1, 1, 9], 2, [0, 0, 0, 1]),
        ([9, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([0, 0, 0], 2, [0, 0, 1]),
        ([0, 0, 10], 3, [0, 1, 2]),
        ([5, 5, 0], 2, [0, 1, 1]),
        ([1, 0, 0], 2, [0, 1, 1]),
    ],
)
def test_cut_by_hand(sizes: list[int], shards: int, expected: list[int]) -> None:
    assert cut(sizes, shards) == expected


_SIZES = st.lists(st.one_of(st.just(0), st.integers(0, 20), st.just(10**9)), min_size=1)


@given(_SIZES, st.data())
def test_no_shard_is_empty_or_left_out(sizes: list[int], data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(sizes)))
    numbers = cut(sizes, shards)
    assert numbers[0] == 0
    assert numbers[-1] == shards - 1
    steps = {later - number for number, later in itertools.pairwise(numbers)}
    assert steps <= {0, 1}


@given(st.lists(st.integers(1, 100), min_size=20), st.integers(1, 10))
def test_shards_differ_by_less_than_two_images(sizes: list[int], shards: int) -> None:
    shards = min(shards, sum(sizes) // max(sizes))  # no image is larger than a shard
    held = [0] * shards
    for number, size in zip(cut(sizes, shards), sizes, strict=True):
        held[number] += size
    assert all(abs(size - sum(sizes) / shards) <= max(sizes) for size in held)


@contextmanager
def empty_table() -> Iterator[sqlite3.Connection]:
    with TemporaryDirectory() as folder, closing(create_table(Path(folder) / "table")) as table:
        yield table


def digest_of(
    row: RecordRow, image_options: ImageOptions = KEEP, stamp: int = 7, file: str = "x"
) -> tuple[int, str, str]:
    """Return the digests of a shard of one row, from a file of its own or one with that stamp."""
    with empty_table() as table:
        table.execute("INSERT INTO sources VALUES (0, '', 'archive', '', 0, ?)", (stamp,))
        own = row._replace(stamp=stamp)
        table.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", own)
        return shard_digests(table, file, range(row.id, row.id + 1), image_options)


_, CONTENT, STAMPS = digest_of(ROW)


def test_digests_of_several_blocks() -> None:
    """Of what is joined in SQL, with names that are no UTF-8."""
    rows = [
        RecordRow(5 + at, at % 3, 0, f"{at}.jpg", at % 2, f"a/{at}.jpg", at % 5 - 1, at, 9 * at)
        for at in range(2500)
    ]
    with empty_table() as table:
        for number in range(2):
            row = (number, "", "archive", "", 0, 70 + number)
            table.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?)", row)
        marks = "?, ?, ?, CAST(? AS TEXT), ?, CAST(? AS TEXT), ?, ?, ?"
        odd = [(*row[:3], b"\xff" + row.name.encode(), *row[4:]) for row in rows]
        table.executemany(f"INSERT INTO records VALUES ({marks})", odd)
        found = shard_digests(table, "x", range(5, 2505), KEEP)
    settings = json.dumps({**asdict(KEEP), "on_bad": False}, sort_keys=True)
    lines = [settings.encode()]
    lines += [b"%d\t%d\t\xff%s\t%d\n" % (row.id, row.label, row.name.encode(), row.size)
              for row in rows]  # fmt: skip
    content = hashlib.sha256(b"".join([*lines, b"x"])).hexdigest()
    times = [row.stamp if row.start < 0 else 70 + row.source for row in rows]
    places = "".join(f"{row.path}\t{row.start}\t{time}\n"
                     for row, time in zip(rows, times, strict=True))  # fmt: skip
    stamps = hashlib.sha256(places.encode()).hexdigest()
    assert found == (sum(row.size for row in rows), content, stamps)


@pytest.mark.parametrize(
    ("digest", "content_differs", "stamps_differ"),
    [
        (digest_of(ROW._replace(id=4)), True, False),
        (digest_of(ROW._replace(label=2)), True, False),
        (digest_of(ROW._replace(name="b.jpg")), True, False),  # the suffix matters for conversion
        (digest_of(ROW._replace(size=11)), True, False),
        (digest_of(ROW._replace(path="bee/a.jpg")), False, True),
        (digest_of(ROW._replace(start=512)), False, True),
        (digest_of(ROW, stamp=8), False, True),
        (digest_of(ROW._replace(labeled=1)), False, False),  # no .rec file contains it
        (digest_of(ROW, replace(KEEP, check="decode")), True, False),
        (digest_of(ROW, replace(KEEP, on_bad="convert")), True, False),
        (digest_of(ROW, replace(KEEP, on_bad="skip")), False, False),
        (digest_of(ROW, replace(KEEP, short_side=100)), True, False),
        (digest_of(ROW, replace(KEEP, quality=80)), True, False),
        (digest_of(ROW, replace(KEEP, min_shrink=1.5)), True, False),
    ],
)
def test_changes_in_a_shard(
    digest: tuple[int, str, str], content_differs: bool, stamps_differ: bool
) -> None:
    assert (digest[1] != CONTENT) == content_differs
    assert (digest[2] != STAMPS) == stamps_differ


HOW = SplitOptions(labeled="4", shards=3)


def whole_digest(path: Path, how: SplitOptions, *, spec: str = "here", classes: str = "bee") -> str:
    plan_of(path / "plan", MadeSource(images_of({"ant": 10, classes: 10}), spec), how)
    with open_table(path / "plan") as table:
        return plan_digest(table)


def test_plan_digest(tmp_path: Path) -> None:
    digest = whole_digest(tmp_path, HOW)
    assert whole_digest(tmp_path, HOW, spec="elsewhere") == digest
    assert whole_digest(tmp_path, replace(HOW, shards=None, shard_size=70)) == digest
    changed = [
        replace(HOW, labeled="6"),
        replace(HOW, split_seed=1),
        replace(HOW, unlabeled="rest"),
        replace(HOW, layout="separate"),
        replace(HOW, shards=2),
        replace(HOW, shuffle_seed=1),
        replace(HOW, order="list"),
    ]
    others = {whole_digest(tmp_path, how) for how in changed}
    others |= {digest, whole_digest(tmp_path, HOW, classes="cat")}
    assert len(others) == len(changed) + 2
