"""Damage of every kind is found and attributed to its file, its record and the image's source."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import DataError
from mpl_fast.packing.check.shard_check import check_shard
from mpl_fast.packing.check.verify import verify
from mpl_fast.packing.plan.table import TABLE, open_table
from tests.packing.packs import (
    MAGIC,
    hashes,
    image_tree,
    jpeg,
    make_tree,
    read_split,
    run,
    verified,
)
from tests.packing.small_pack import SmallPack, make_pack

FIRST, SECOND = "train-00000-of-00002.rec", "train-00001-of-00002.rec"
FIRST_IDX, SECOND_IDX = "train-00000-of-00002.idx", "train-00001-of-00002.idx"
OTHER = "its crc32 is not the manifest's"
OTHER_TEXT = "its sha256 is not the manifest's"
GOLDEN = Path(__file__).parents[1] / "golden" / "old_pack"
GONE = "No such file or directory"
# Frame, header, and images of 5, 0 and 3 bytes over a multiple of 4; the second has three parts.
TINY = {
    0: b"\xff\xd8\xff1234567",
    1: MAGIC + b"ab" * 4 + MAGIC + b"c",
    2: b"\xff\xd8\xff7",
    3: b"x",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SmallPack:
    root = tmp_path_factory.mktemp("whole") / "rec"
    return make_pack(root, shards={"train": [4, 4], "val": [3]}, labeled={0, 5})


@pytest.fixture
def pack(whole: SmallPack, tmp_path: Path) -> SmallPack:
    """Return a copy that may be damaged."""
    return replace(whole, root=Path(shutil.copytree(whole.root, tmp_path / "rec")))


def problems(root: Path, *, deep: bool = False) -> list[str]:
    return [str(problem) for problem in verified(root, deep=deep).problems]


def named(pack: SmallPack, number: int) -> str:
    """Return how a problem begins that names a record."""
    record = pack.records[number]
    return f"{record.file}: record {number} ({record.key}, from {pack.source / record.key}): "


def change(path: Path, at: int, content: bytes = b"\x5a") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = json.loads((root / MANIFEST).read_text())
    change(stored)
    (root / MANIFEST).write_text(json.dumps(stored))


def swap(first: Path, second: Path) -> None:
    other = first.with_name("other")
    first.rename(other)
    second.rename(first)
    other.rename(second)


def edit_table(root: Path) -> None:
    with sqlite3.connect(root / TABLE) as table:
        table.execute("UPDATE written SET crc32 = 7 WHERE id = 5")
    table.close()


@pytest.mark.parametrize(
    ("layout", "train", "deep"),
    [
        ("shared", {"train": [4, 4]}, False),
        ("separate", {"train_label": [3], "train_unlabel": [2, 2]}, True),
    ],
)
def test_a_sound_folder_has_no_problem(
    tmp_path: Path, layout: str, train: dict[str, list[int]], deep: bool
) -> None:
    pack = make_pack(tmp_path / "rec", shards={**train, "val": [2]}, layout=layout, skipped={2})
    seen: list[tuple[int, int]] = []
    report = verify(pack.root, deep=deep, processes=2, progress=lambda *done: seen.append(done))
    files = list(pack.root.glob("*.rec"))
    assert report.problems == ()
    assert (report.shards, report.records) == (len(files), len(pack.records))
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert seen[-1] == (report.records, report.bytes)
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
    for at, bits in product(range(len(content)), (0x01, 0x80)):
        path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
        (found,) = check_shard(pack.root, entry, shard, False, lambda records, size: None)
        owner = max(pack.records.values(), key=lambda record: (record.offset <= at, record.id))
        assert found.record == owner.id, at
        ends = {8: "frame", 32: "header", 32 + len(owner.image): "image", 99: "padding"}
        part = next(part for end, part in ends.items() if at - owner.offset < end)
        if owner.id != 1:  # that has parts, with frames between them
            assert found.text == f"its {part} is damaged", at


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
def test_damage_is_attributed_to_records(pack: SmallPack, deep: bool) -> None:
    records = pack.records
    # Record 1 has several parts.
    harm = {0: (20, "header"), 1: (300, "image"), 2: (0, "frame"), 8: (24, "header")}
    for number, (at, _) in harm.items():
        change(pack.root / records[number].file, records[number].offset + at)
    change(pack.root / FIRST, (pack.root / FIRST).stat().st_size - 1)
    size, cut = (pack.root / SECOND).stat().st_size, records[6].offset + 100
    os.truncate(pack.root / SECOND, cut)
    with (pack.root / "val.rec").open("ab") as file:
        file.write(bytes(5))
    report = verified(pack.root, deep=deep)
    assert [str(problem) for problem in report.problems] == [
        *(f"{named(pack, number)}its {harm[number][1]} is damaged" for number in (0, 1, 2)),
        f"{named(pack, 3)}its padding is damaged",
        f"{SECOND}: cut short: {cut} of {size} bytes",
        f"{named(pack, 6)}is cut short",
        f"{named(pack, 7)}is missing",
        "val.rec: 5 bytes too many at its end",
        f"{named(pack, 8)}its header is damaged",
    ]
    stored = json.loads(json.dumps(report.as_json()))
    assert not stored["sound"]
    assert stored["problems"][4] == {"file": SECOND, "text": f"cut short: {cut} of {size} bytes"}
    assert stored["problems"][1] == {
        "file": FIRST,
        "text": "its image is damaged",
        "record": 1,
        "image": "bee/train_1.jpg",
        "source": str(pack.source / "bee" / "train_1.jpg"),
    }
    assert len(report.lines()) == 10
    with pytest.raises(DataError, match=r"9 problems: .* and 6 more; delete train-0.* only that"):
        report.require_sound()


def line_of(file: str, number: int, found: str, right: str) -> list[str]:
    return [f"{file}: {OTHER_TEXT}: line {number} is {found!r}, it should be {right!r}"]


@pytest.mark.parametrize(
    ("harm", "lines"),
    [
        (lambda at: (at / FIRST).unlink(), [f"{FIRST}: {GONE}"]),
        (lambda at: swap(at / FIRST, at / "folder"), [f"{FIRST}: Is a directory"]),
        (lambda at: swap(at / FIRST, at / SECOND),
         [f"{FIRST}: holds the content of {SECOND}", f"{SECOND}: holds the content of {FIRST}"]),
        (lambda at: swap(at / FIRST_IDX, at / "val.lst"),
         [f"{FIRST_IDX}: holds the content of val.lst",
          f"val.lst: holds the content of {FIRST_IDX}"]),
        (lambda at: edit(at / "classes.txt", "bee", "boe"), [f"classes.txt: {OTHER_TEXT}"]),
        (lambda at: edit(at / FIRST_IDX, "\t0\n", "\t4\n"), [f"{FIRST_IDX}: {OTHER_TEXT}"]),
        (lambda at: edit(at / "train.lst", "5\t2\t", "5\t1\t"),
         line_of("train.lst", 6, "5\t1\tcat/train_5.jpg", "5\t2\tcat/train_5.jpg")),
        (lambda at: edit(at / "train_unlabel.idx", "0\t0\n", "0\t8\n"),
         line_of("train_unlabel.idx", 1, "0\t8", "0\t0")),
        (lambda at: edit(at / "train_label.lst", "5\t2\t", "4\t2\t"),
         line_of("train_label.lst", 2, "4\t2\tcat/train_5.jpg", "5\t2\tcat/train_5.jpg")),
        (lambda at: edit(at / "val.lst", "10\t1\tbee/val_10.jpg\n", ""),
         line_of("val.lst", 3, "", "10\t1\tbee/val_10.jpg")),
        (lambda at: (at / "val.lst").unlink(), [f"val.lst: {GONE}"]),
        (lambda at: (at / "classes.txt").unlink(), [f"classes.txt: {GONE}"]),
        (edit_table, [f"{TABLE}: {OTHER_TEXT}"]),
        (lambda at: (at / TABLE).unlink(), [f"{TABLE}: {GONE}"]),
        (lambda at: edit_manifest(at, lambda stored: stored["shards"][0].update(records=3)),
         [f"{MANIFEST}: its shards are not those of {TABLE}; pack again"]),
        (lambda at: edit_manifest(at, lambda stored: stored["shards"][0].update(bytes=3)),
         [f"{MANIFEST}: its shards are not those of {TABLE}; pack again"]),
        (lambda at: edit_manifest(at, lambda stored: stored["splits"]["train"]["shards"].pop()),
         [f"{MANIFEST}: its splits are not those of {TABLE}; pack again"]),
        (lambda at: edit_manifest(at, lambda stored: (stored["classes"].update(n=4),
                                                      stored["splits"].pop("val"))),
         [f"{MANIFEST}: its classes and splits are not those of {TABLE}; pack again"]),
        (lambda at: edit_manifest(at, lambda stored: stored["shards"][0].update(crc32="0")),
         [f"{FIRST}: every record is as the table has it, but {OTHER}"]),
    ],
)  # fmt: skip
def test_damaged_files(pack: SmallPack, harm: Callable[[Path], None], lines: list[str]) -> None:
    (pack.root / "folder").mkdir()
    harm(pack.root)
    report = verified(pack.root)
    assert sorted(map(str, report.problems)) == sorted(lines)
    with pytest.raises(DataError):
        report.require_sound()


def test_a_file_that_cannot_be_read_again(pack: SmallPack, monkeypatch: pytest.MonkeyPatch) -> None:
    (pack.root / FIRST).unlink()
    entry = json.loads((pack.root / MANIFEST).read_text())["shards"][0]
    with open_table(pack.root / TABLE) as table:
        shard = table.shards()[0]
    monkeypatch.setattr("mpl_fast.packing.check.shard_check.file_fault", lambda *_: "")
    (found,) = check_shard(pack.root, entry, shard, True, lambda records, size: None)
    assert str(found) == f"{FIRST}: {GONE}"


@pytest.mark.parametrize("harm", [edit_table, lambda at: (at / TABLE).write_bytes(b"no table")])
def test_with_a_damaged_table_only_checksums_are_compared(
    pack: SmallPack, harm: Callable[[Path], None]
) -> None:
    harm(pack.root)
    change(pack.root / SECOND, 200)
    change(pack.root / "val.lst", 0)
    assert problems(pack.root, deep=True) == [
        *(f"{TABLE}: {OTHER_TEXT}", f"{SECOND}: {OTHER}", f"val.lst: {OTHER_TEXT}")
    ]


def test_images_that_were_packed_undecodable(tmp_path: Path) -> None:
    images = {1: jpeg(1)[:200], 2: b"text"}
    pack = make_pack(tmp_path / "rec", shards={"train": [4]}, images=images)
    assert problems(pack.root) == []
    report = verified(pack.root, deep=True)
    first, second = map(str, report.problems)
    assert first.startswith(f"{named(pack, 1)}undamaged, but cannot be decoded: ")
    assert (
        second == f"{named(pack, 2)}undamaged, but cannot be decoded: no image by its first bytes"
    )
    with pytest.raises(DataError, match="delete the folder's files and pack again"):
        report.require_sound()


def test_a_pack_of_an_earlier_version(tmp_path: Path) -> None:
    """tests/golden/old_pack: of commit 25e28d9, which had a sha256 for each .rec file.

    By `pack --src tree/train --val tree/val --labeled 2 --shards 2`.
    """
    old = Path(shutil.copytree(GOLDEN, tmp_path / "old"))
    assert problems(old) == problems(old, deep=True) == []
    # Its images make the same files again, but for times and paths in the table and the manifest.
    for stem in ("train", "val"):
        images = {f"{stem}/{key}": image for *_, key, image in read_split(old, stem)}
        make_tree(tmp_path / "tree", images)
    tree, new = tmp_path / "tree", tmp_path / "new"
    sources = ("--src", tree / "train", "--val", tree / "val")
    run("pack", *sources, "--labeled", 2, "--shards", 2, "--out", new)
    varying = {MANIFEST, TABLE, ".lock"}
    texts = [{name: one for name, one in hashes(at).items() if name not in varying}
             for at in (old, new)]  # fmt: skip
    assert texts[0] == texts[1]
    assert len(texts[0]) == 17
    manifests = [json.loads((at / MANIFEST).read_text()) for at in (old, new)]
    assert [{*stored["shards"][0]} - {"crc32", "sha256"} for stored in manifests] == [
        {"file", "prefix", "bytes", "records", "multipart", "first_id", "idx", "idx_sha256"}
    ] * 2
    for key in ("plan_sha256", "splits", "classes", "duplicates"):
        assert manifests[0][key] == manifests[1][key]
    change(old / FIRST, 100)
    (problem,) = problems(old)
    assert problem.startswith(f"{FIRST}: record 0 (bee/")
    shutil.copy(old / SECOND, old / FIRST)
    assert f"{FIRST}: holds the content of {SECOND}" in problems(old)[0]


def test_folders_that_are_no_finished_pack(pack: SmallPack, tmp_path: Path) -> None:
    def refused(root: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            verified(root)

    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path / ("x" * 300), "x: File name too long")
    whole = (pack.root / MANIFEST).read_text()
    edit_manifest(pack.root, lambda stored: stored["shards"][0].update(file="gone"))
    refused(pack.root, rf"manifest\.json: damaged \({FIRST}.*\); pack again")
    edit_manifest(pack.root, lambda stored: stored["splits"]["train"].update(shards=[7]))
    refused(pack.root, r"manifest\.json: damaged \((.*, )?7(, .*)?\); pack again")
    for part, at, key in (
        ("shards", 0, "crc32"),
        ("shards", 0, "idx_sha256"),
        ("splits", "train", "lst_sha256"),
    ):
        stored = json.loads(whole)
        del stored[part][at][key]
        (pack.root / MANIFEST).write_text(json.dumps(stored))
        refused(pack.root, rf"manifest\.json: damaged \('{key}'\); pack again")
    (pack.root / MANIFEST).unlink()
    refused(pack.root, r"has no manifest\.json")
    (pack.root / ".pack").mkdir()
    refused(pack.root, "its packing is not finished; run the same pack command")


def test_a_damaged_shard_is_packed_again_as_the_message_says(tmp_path: Path) -> None:
    tree, out = image_tree(tmp_path), tmp_path / "rec"
    arguments = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--out", out)
    run("pack", *arguments, "--shards", 2)
    before = hashes(out)
    assert "all is sound" in run("verify", out, "--deep", "-j", 2).stdout
    shard = out / FIRST
    change(shard, shard.stat().st_size - 60)
    error = run("verify", out, status=DataError.exit_code).stderr.splitlines()[-1]
    assert ": 1 problem: " in error
    assert f"delete {FIRST} and run its pack command again" in error
    printed = run("verify", "--json", out, status=DataError.exit_code).stdout
    (problem,) = json.loads(printed)["problems"]
    assert problem["file"] == FIRST
    assert Path(problem["source"]).parent.parent == tree / "train"
    shard.unlink()
    run("pack", *arguments, "--shards", 2)
    assert hashes(out) == before
