"""Damage of every kind is found, and told by its file, its record and the image's source."""

import json
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import DataError, UserError
from mpl_fast.packing.check.shard_check import check_shard
from mpl_fast.packing.check.verify import Report, verify
from mpl_fast.packing.plan.table import TABLE, open_table
from tests.packing.packs import MAGIC, hashes, image_tree, jpeg, run, verified
from tests.packing.small_pack import SmallPack, make_pack

FIRST, SECOND = "train-00000-of-00002.rec", "train-00001-of-00002.rec"
# Frame, header, and images of 5, 0 and 3 bytes over a multiple of 4; the second has three parts.
TINY = {
    0: b"\xff\xd8\xff1234567",
    1: MAGIC + b"ab" * 4 + MAGIC + b"c",
    2: b"\xff\xd8\xff7",
    3: b"x",
}


@pytest.fixture
def pack(tmp_path: Path) -> SmallPack:
    return make_pack(tmp_path / "rec", shards={"train": [4, 4], "val": [3]}, labeled={0, 5})


def check(pack: SmallPack, *, deep: bool = False) -> Report:
    return verified(pack.root, deep=deep)


def told(report: Report) -> list[str]:
    return [str(problem) for problem in report.problems]


def change(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def named(pack: SmallPack, number: int) -> str:
    """How a problem begins that names a record."""
    record = pack.records[number]
    source = pack.root.parent / f"{pack.root.name}-source" / record.key
    return f"{record.file}: record {number} ({record.key}, from {source}): "


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
@pytest.mark.parametrize(
    ("layout", "shards"),
    [("shared", {"train": [4, 4], "val": [3]}), ("separate", {"train_label": [3], "val": [2]})],
    ids=["shared", "separate"],
)
def test_a_sound_folder_has_no_problem(
    tmp_path: Path, layout: str, shards: dict[str, list[int]], deep: bool
) -> None:
    pack = make_pack(tmp_path / "rec", shards=shards, layout=layout, labeled={0, 5}, skipped={2})
    seen: list[tuple[int, int]] = []
    report = verify(pack.root, deep=deep, processes=2, progress=lambda *done: seen.append(done))
    size = sum(path.stat().st_size for path in pack.root.glob("*.rec"))
    assert told(report) == []
    assert (report.records, report.bytes) == (len(pack.records), size)
    assert report.shards == len(list(pack.root.glob("*.rec")))
    assert seen[-1] == (len(pack.records), size)
    report.require_sound()
    assert report.lines()[-1].endswith("all is sound")


@pytest.mark.slow
def test_every_changed_byte_is_found_in_its_record(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "rec", shards={"train": [4]}, images=TINY)
    path = pack.root / "train.rec"
    content = path.read_bytes()
    (entry,) = json.loads((pack.root / MANIFEST).read_text())["shards"]
    assert entry["multipart"] == 1
    with open_table(pack.root / TABLE) as table:
        (shard,) = table.shards()
    for at in range(len(content)):
        owner = max(r.id for r in pack.records.values() if r.offset <= at)
        for bits in (0x01, 0x80, 0xFF):
            path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
            found = check_shard(pack.root, entry, shard, False, lambda records, size: None)
            assert [problem.record for problem in found] == [owner], at
            assert found[0].text in {
                f"its {part} is damaged" for part in ("frame", "header", "image", "padding")
            }


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
def test_damage_is_told_by_its_record(pack: SmallPack, deep: bool) -> None:
    harm = {
        0: (20, "header"),
        1: (300, "image"),  # of several parts
        4: (0, "frame"),
        5: (-1, "padding"),
        6: (300, "image"),
        9: (24, "header"),
    }
    for number, (at, _) in harm.items():
        record = pack.records[number]
        end = min(r.offset for r in pack.of(record.file) if r.offset > record.offset)
        change(pack.root / record.file, record.offset + at if at >= 0 else end + at, b"\x5a")
    assert told(check(pack, deep=deep)) == [
        f"{named(pack, number)}its {part} is damaged" for number, (_, part) in harm.items()
    ]


def _cut(pack: SmallPack) -> list[str]:
    size = pack.records[6].offset + 100
    whole = (pack.root / SECOND).stat().st_size
    os.truncate(pack.root / SECOND, size)
    return [
        f"{SECOND}: cut short: {size} of {whole} bytes",
        f"{named(pack, 6)}is cut short",
        f"{named(pack, 7)}is missing",
    ]


def _lengthen(pack: SmallPack) -> list[str]:
    with (pack.root / SECOND).open("ab") as file:
        file.write(bytes(5))
    return [f"{SECOND}: 5 bytes too many at its end"]


def _hide(pack: SmallPack) -> list[str]:
    (pack.root / FIRST).unlink()
    (pack.root / FIRST).mkdir()
    return [f"{FIRST}: Is a directory"]


def _exchange(first: str, second: str) -> Callable[[SmallPack], list[str]]:
    def exchange(pack: SmallPack) -> list[str]:
        one, two, other = pack.root / first, pack.root / second, pack.root / "other"
        one.rename(other)
        two.rename(one)
        other.rename(two)
        return [
            f"{first}: holds the content of {second}",
            f"{second}: holds the content of {first}",
        ]

    return exchange


def _edit(file: str, old: str, new: str, *lines: str) -> Callable[[SmallPack], list[str]]:
    def edit(pack: SmallPack) -> list[str]:
        text = (pack.root / file).read_text()
        assert old in text
        (pack.root / file).write_text(text.replace(old, new, 1))
        return [f"{file}: {line}" for line in lines]

    return edit


def _remove(file: str) -> Callable[[SmallPack], list[str]]:
    def remove(pack: SmallPack) -> list[str]:
        (pack.root / file).unlink()
        return [f"{file}: No such file or directory"]

    return remove


OTHER = "its sha256 is not the manifest's"


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        _lengthen,
        _remove(FIRST),
        _hide,
        _exchange(FIRST, SECOND),
        _exchange(FIRST.replace("rec", "idx"), SECOND.replace("rec", "idx")),
        _edit("classes.txt", "bee", "boe", OTHER),
        _edit(FIRST.replace("rec", "idx"), "\t0\n", "\t4\n", OTHER),
        _edit("train.lst", "5\t2\t", "5\t1\t",
              f"{OTHER}: line 6 is '5\\t1\\tcat/train_5.jpg', it should be "
              "'5\\t2\\tcat/train_5.jpg'"),
        _edit("train.idx", "0\t0\n", "0\t8\n",
              f"{OTHER}: line 1 is '0\\t8', it should be '0\\t0'"),
        _edit("train_label.lst", "0\t0\tant/train_0.jpg\n", "0\t0\tant/train_0.jpg\nx\n",
              f"{OTHER}: line 2 is 'x', no record of these files has its place here"),
        _edit("val.lst", "10\t1\tbee/val_10.jpg\n", "",
              OTHER),
        _remove("train_label.idx"),
        _remove("val.lst"),
        _remove("classes.txt"),
    ],
)  # fmt: skip
def test_damaged_files_are_told_apart(
    pack: SmallPack, harm: Callable[[SmallPack], list[str]]
) -> None:
    expected = harm(pack)
    report = check(pack)
    assert sorted(told(report)) == sorted(expected)
    with pytest.raises(DataError):
        report.require_sound()


def test_all_damage_is_collected(pack: SmallPack) -> None:
    for number in (1, 3, 6):
        change(pack.root / pack.records[number].file, pack.records[number].offset + 200, b"\x5a")
    change(pack.root / "val.rec", 0, b"\x5a")
    report = check(pack)
    assert [problem.record for problem in report.problems] == [1, 3, 6, 8]
    stored = json.loads(json.dumps(report.as_json()))
    assert not stored["sound"]
    assert stored["problems"][2] == {
        "file": SECOND,
        "text": "its image is damaged",
        "record": 6,
        "image": "ant/train_6.jpg",
        "source": str(pack.root.parent / "rec-source" / "ant" / "train_6.jpg"),
    }
    assert len(report.lines()) == 5
    with pytest.raises(DataError, match=r"4 problems: .* and 1 more; delete train-0.* only that"):
        report.require_sound()


def test_only_a_deep_look_finds_what_was_packed_undecodable(tmp_path: Path) -> None:
    whole = {number: jpeg(number) for number in range(4)}
    cut = {1: whole[1][:200], 2: b"text"}
    pack = make_pack(tmp_path / "rec", shards={"train": [4]}, images=whole | cut)
    assert told(check(pack)) == []
    deep = told(check(pack, deep=True))
    assert len(deep) == 2
    assert deep[0].startswith(f"{named(pack, 1)}undamaged, but cannot be decoded: ")
    assert deep[1] == f"{named(pack, 2)}undamaged, but cannot be decoded: neither JPEG nor PNG"


def _alter(pack: SmallPack, sql: str) -> None:
    with sqlite3.connect(pack.root / TABLE) as table:
        table.execute(sql)
    table.close()


@pytest.mark.parametrize(
    ("sql", "deep", "expected"),
    [
        ("UPDATE written SET size = size + 1 WHERE id = 5", False,
         f"damaged: its row of record 5 does not fit {SECOND}"),
        ("UPDATE written SET crc32 = 7 WHERE id = 5", True,
         f"damaged: its row of record 5 does not fit {SECOND}"),
        ("UPDATE written SET offset = offset + 4 WHERE id = 5", False,
         f"damaged: the records of {SECOND} do not fill its "),
        ("DELETE FROM written WHERE id = 5", False,
         f"damaged: 3 records of {SECOND}, the manifest has 4"),
        ("UPDATE written SET offset = 'x' WHERE id = 5", False,
         "damaged: its row of record 5 holds what it cannot"),
        ("UPDATE records SET label = 3 WHERE id = 5", False,
         "damaged: its row of record 5 holds what it cannot"),
        ("UPDATE written SET crc32 = -1 WHERE id = 5", False,
         f"damaged: {SECOND} has rows that are no numbers"),
        ("UPDATE records SET name = 'y' WHERE id = 5", False,
         "damaged: train.lst, which is undamaged, does not fit it: line 6 is"),
        ("UPDATE classes SET name = 'y' WHERE label = 1", False,
         "damaged: its classes are not those of classes.txt"),
        ("DROP TABLE written", False, "damaged (no such table: written)"),
        ("DELETE FROM shards WHERE number = 1", False, f"damaged: it lacks {SECOND}"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_told_from_damaged_records(
    pack: SmallPack, sql: str, deep: bool, expected: str
) -> None:
    _alter(pack, sql)
    problems = told(check(pack, deep=deep))
    assert problems
    assert all(problem.startswith(f"{TABLE}: ") for problem in problems)
    assert any(problem.startswith(f"{TABLE}: {expected}") for problem in problems)


@pytest.mark.parametrize("harm", ["overwrite", "remove"])
def test_without_its_table_a_folder_is_still_compared_with_its_checksums(
    pack: SmallPack, harm: str
) -> None:
    if harm == "overwrite":
        (pack.root / TABLE).write_bytes(b"no table" * 1000)
    else:
        (pack.root / TABLE).unlink()
    change(pack.root / SECOND, 200, b"\x5a")
    change(pack.root / "val.lst", 0, b"\x5a")
    table, *others = told(check(pack))
    assert table.startswith(f"{TABLE}: ")
    assert others == [f"{SECOND}: {OTHER}", f"val.lst: {OTHER}"]


def test_folders_that_are_no_finished_pack_are_refused(pack: SmallPack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        verify(tmp_path / "absent", deep=False, processes=1, progress=lambda *done: None)
    manifest = json.loads((pack.root / MANIFEST).read_text())
    del manifest["shards"][0]["sha256"]
    (pack.root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: damaged \('sha256'\); pack again"):
        check(pack)
    (pack.root / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        check(pack)
    (pack.root / ".pack").mkdir()
    with pytest.raises(DataError, match="its packing is not finished; run the same pack command"):
        check(pack)


def test_a_killed_worker_is_an_error(pack: SmallPack) -> None:
    """A pipe that nobody writes to keeps the worker waiting until it is killed."""
    (pack.root / FIRST).unlink()
    os.mkfifo(pack.root / FIRST)

    def kill(records: int, size: int) -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(UserError, match="a worker process died"):
        verify(pack.root, deep=False, processes=1, progress=kill)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_a_damaged_shard_is_mended_as_the_message_says(tmp_path: Path, layout: str) -> None:
    tree = image_tree(tmp_path)
    sources = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 2)
    arguments = (*sources, "--layout", layout, "--out", tmp_path / "rec")
    run("pack", *arguments)
    before = hashes(tmp_path / "rec")
    assert "all is sound" in run("verify", tmp_path / "rec", "--deep", "-j", 2).stdout
    shard = next(path for path in sorted((tmp_path / "rec").glob("train*.rec")))
    change(shard, shard.stat().st_size - 60, b"\x5a")
    error = run("verify", tmp_path / "rec", status=DataError.exit_code).stderr.splitlines()[-1]
    assert ": 1 problem: " in error
    assert f"delete {shard.name} and run its pack command again" in error
    told = json.loads(run("verify", "--json", tmp_path / "rec", status=DataError.exit_code).stdout)
    (problem,) = told["problems"]
    assert problem["file"] == shard.name
    assert Path(problem["source"]).parent.parent == tree / "train"
    assert Path(problem["source"]).read_bytes()
    shard.unlink()
    run("pack", *arguments)
    assert hashes(tmp_path / "rec") == before
    assert "all is sound" in run("verify", tmp_path / "rec").stdout
