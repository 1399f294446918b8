"""The end of a pack: table, indexes, listings and manifest agree with the files."""

import hashlib
import itertools
import os
import tracemalloc
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from mpl_fast.data.manifest import file_names, text_hashes
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions, Json, PackOptions, SplitOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow, create_written, edit_table, open_table
from mpl_fast.packing.publish.duplicates import describe_duplicates, find_duplicates
from mpl_fast.packing.publish.finish import finish, unfinished_shards
from mpl_fast.packing.write.shard_receipt import ShardReceipt
from tests.packing.packs import (
    FIRST_ID,
    KEEP,
    SHARD,
    Planned,
    finished,
    folder,
    jpeg,
    make_table,
    make_tar,
    make_tree,
    options_of,
    plan_work,
    read_record,
    split_line,
    with_magic,
    write_shards,
    written_rows,
)

HOW = SplitOptions(labeled="4", shards=2)
SKIP = ImageOptions(on_bad="skip")
BAD = {"train/ant/1.jpg", "train/bee/4.jpg", "val/ant/0.jpg"}


class Pack(NamedTuple):
    """A pack that only lacks its manifest."""

    tree: Path
    how: SplitOptions
    work: Path
    manifest: Json


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_images(tmp_path)


def make_images(folder: Path) -> Path:
    """Return a folder with train/ (ant, bee: 6 each) and val/ (ant: 2, bee: 3), all different."""
    counts = {"train/ant": 6, "train/bee": 6, "val/ant": 2, "val/bee": 3}
    names = [f"{name}/{at}.jpg" for name, count in counts.items() for at in range(count)]
    content = {name: jpeg(at) for at, name in enumerate(names)}
    content["train/bee/0.jpg"] = with_magic(content["train/bee/0.jpg"])
    return make_tree(folder / "tree", content)


def options(tree: Path, how: SplitOptions = HOW, image_options: ImageOptions = KEEP) -> PackOptions:
    packed = options_of(tree / "train", tree.parent / "out", how, tree / "val")
    return replace(packed, image=image_options)


@pytest.fixture(
    scope="module", params=itertools.product(("shared", "separate"), ("all", "rest"), (1, 3))
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    layout, unlabeled, shards = request.param
    how = replace(HOW, layout=layout, unlabeled=unlabeled, shards=shards)
    tree = make_images(tmp_path_factory.mktemp("whole"))
    return Pack(tree, how, *finished(options(tree, how)))


def entries(work: Path, stem: str) -> tuple[list[tuple[int, int]], list[tuple[int, int, str]]]:
    """Return the (id, offset) of an index, each once, and the (id, label, class/name) listed."""
    lines = [line.split("\t") for line in (work / f"{stem}.idx").read_text().splitlines()]
    listed = [split_line(line) for line in (work / f"{stem}.lst").read_bytes().splitlines()]
    return (
        list(dict.fromkeys((int(number), int(offset)) for number, offset in lines)),
        [(int(number), int(label), name) for number, label, name in listed],
    )


def test_table_has_the_place_of_each_image(whole: Pack) -> None:
    tree, how, work, manifest = whole
    count = 0
    with open_table(work / TABLE) as table:
        for shard, entry in zip(table.shards(), manifest["shards"], strict=True):
            content = (work / shard.file).read_bytes()
            at = 0
            for record, written in written_rows(table, shard):
                image = read_record(content, written.offset)[24:]
                part = "val" if shard.prefix == "val" else "train"
                assert image == (tree / part / record.path).read_bytes()
                assert (written.size, written.crc32) == (len(image), zlib.crc32(image))
                assert written.offset == at
                at += written.length
                count += 1
            assert at == len(content) == entry["bytes"]
            assert f"{zlib.crc32(content):08x}" == entry["crc32"]
            if how.shards != 1:
                lines = (work / entry["idx"]).read_text().splitlines()
                assert lines[0] == f"{entry['first_id']}\t0"
                done = ShardReceipt.load(work / f"{entry['file']}.done")
                places = zip(done.ids.tolist(), done.offsets.tolist(), strict=True)
                assert [tuple(map(int, line.split("\t"))) for line in lines] == list(places)
    twice = how.layout == "separate" and how.unlabeled == "all"
    assert count == manifest["totals"]["images"] == (21 if twice else 17)
    labeled = {key for _, _, key in entries(work, "train_label")[1]}
    multipart = sum(shard["multipart"] for shard in manifest["shards"])
    assert multipart == (2 if twice and "bee/0.jpg" in labeled else 1)
    assert describe_duplicates(manifest["duplicates"]) == ""


def test_indexes_and_lists_agree(whole: Pack) -> None:
    tree, how, work, manifest = whole
    counts = {}
    for split in manifest["splits"].values():
        content = b"".join((work / name).read_bytes() for name in split["shards"])
        index, listed = entries(work, split["idx"].removesuffix(".idx"))
        assert split["lst"] == split["idx"].replace("idx", "lst")
        assert [number for number, _ in index] == [number for number, _, _ in listed]
        part = "val" if split["idx"] == "val.idx" else "train"
        for (_, offset), (_, label, name) in zip(index, listed, strict=True):
            assert read_record(content, offset)[24:] == (tree / part / name).read_bytes()
            assert name.startswith(("ant/", "bee/")[label])
        counts[split["idx"]] = split["records"]
        assert split["records"] == len(listed)
        per_class = Counter(label for _, label, _ in listed)
        assert split["per_class_min"] == min(per_class.values())
        assert split["per_class_max"] == max(per_class.values())
    expected = {"train_label.idx": 4, "train_unlabel.idx": 12 if how.unlabeled == "all" else 8}
    expected |= {"val.idx": 5} | ({"train.idx": 12} if how.layout == "shared" else {})
    assert counts == expected
    val = manifest["splits"]["val"]
    assert (val["per_class_min"], val["per_class_max"]) == (2, 3)


def test_manifest_names_every_file_with_its_hash(whole: Pack) -> None:
    _, how, work, manifest = whole
    made = {path.name for path in work.iterdir() if path.suffix not in (".done", ".lock")}
    assert made == set(file_names(manifest))
    for name, sha256 in text_hashes(manifest).items():
        assert hashlib.sha256((work / name).read_bytes()).hexdigest() == sha256
    if (how.layout, how.shards) == ("separate", 1):
        stems, kinds = ("train_label", "train_unlabel", "val"), ("rec", "idx", "lst")
        nine = {f"{stem}.{kind}" for stem in stems for kind in kinds}
        assert made == nine | {"classes.txt", TABLE}


def test_every_file_is_on_disk_before_the_manifest(
    whole: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is written after finish, and from which on the pack counts as complete."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _, _, work, _ = whole
    manifest = finish(work)
    assert {*text_hashes(manifest)} <= {name.removesuffix(".tmp") for name in synced}
    assert work.name in synced


def test_unfinished_shards(tree: Path) -> None:
    work = plan_work(options(tree))
    shards = Planned(work / TABLE).shards
    names = [shard.file for shard in shards]
    assert unfinished_shards(work, shards) == names
    write_shards(work)
    assert unfinished_shards(work, shards) == []
    first, second, third, fourth = names
    (work / first).rename(work / "away")
    (work / f"{second}.done").unlink()
    with (work / third).open("ab") as file:
        file.write(b"\0")
    (work / f"{fourth}.done").write_bytes(b"damaged")
    assert unfinished_shards(work, shards) == names
    (work / "away").rename(work / first)
    assert unfinished_shards(work, shards) == [second, third, fourth]
    assert unfinished_shards(work, shards[:1]) == []
    for other in (shards[0]._replace(content="other"), shards[0]._replace(stamps="other")):
        assert unfinished_shards(work, [other]) == [first]
    before = (work / TABLE).read_bytes()
    with pytest.raises(DataError, match="3 shards of the plan are not there: "):
        finish(work)
    assert (work / TABLE).read_bytes() == before
    assert not (work / "classes.txt").exists()


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("shards", [1, 2])
def test_skipped_images_are_a_gap_everywhere(tree: Path, layout: str, shards: int) -> None:
    for name in BAD:
        (tree / name).write_bytes(b"no image")
    how = replace(HOW, layout=layout, shards=shards)
    work, manifest = finished(options(tree, how, SKIP))
    plan = Planned(work / TABLE)
    val = {row.id for row in plan.of("val")}
    bad = {
        row.id: row.path
        for row in plan.rows
        if f"{'val' if row.id in val else 'train'}/{row.path}" in BAD
    }
    keys = {name.partition("/")[2] for name in BAD}
    assert set(bad.values()) == keys
    with open_table(work / TABLE) as table:
        written = {number for (number,) in table.query("SELECT id FROM written")}
    assert written == {row.id for row in plan.rows} - bad.keys()
    listed = set()
    for split in manifest["splits"].values():
        index, rows = entries(work, split["idx"].removesuffix(".idx"))
        listed |= {number for number, _ in index}
        assert {number for number, _ in index} == {number for number, _, _ in rows}
        assert split["records"] == len(rows)
        assert split["per_class_max"] == max(Counter(label for _, label, _ in rows).values())
    assert listed == written
    if shards > 1:
        indexes = [(work / shard["idx"]).read_text() for shard in manifest["shards"]]
        lines = "".join(indexes).splitlines()
        assert {int(line.split("\t")[0]) for line in lines} == written
    assert manifest["totals"]["images"] == len(written)
    assert sum(shard["records"] for shard in manifest["shards"]) == len(written)
    remarks = manifest["bad"]
    assert len(remarks) == len(bad)
    assert {remark["image"] for remark in remarks} == keys
    assert {remark["source"] for remark in remarks} == {str(tree / name) for name in BAD}
    assert {remark["action"] for remark in remarks} == {"skipped"}
    assert all(remark["reason"] for remark in remarks)
    assert manifest["splits"]["val"]["per_class_min"] == 1


def test_split_of_which_nothing_is_left(tree: Path) -> None:
    names = tree.parent / "names.txt"
    names.write_text("ant/0.jpg\nbee/0.jpg\n")
    for name in ("ant", "bee"):
        (tree / "train" / name / "0.jpg").write_bytes(b"no image")
    packed = options(tree, replace(HOW, labeled=str(names)), SKIP)
    with pytest.raises(DataError, match="labeled: none of its images is left"):
        finished(packed)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_images_that_are_there_twice(tree: Path, layout: str) -> None:
    for number in range(13):  # only ten groups are named
        for name in ("one", "two"):
            (tree / f"train/ant/{name}-{number}.jpg").write_bytes(jpeg(1000 + number))
    found = finished(options(tree, replace(HOW, layout=layout)))[1]["duplicates"]
    assert (found["groups"], found["images"], found["across_splits"]) == (13, 26, 0)
    assert len(found["examples"]) == 10


def test_images_in_training_and_validation(tree: Path) -> None:
    for name in ("train/ant/5.jpg", "val/ant/0.jpg"):
        (tree / name).write_bytes((tree / "train/ant/2.jpg").read_bytes())
    os.link(tree / "train/bee/3.jpg", tree / "train/bee/again.jpg")
    found = finished(options(tree))[1]["duplicates"]
    assert (found["groups"], found["images"], found["across_splits"]) == (2, 5, 1)
    assert sorted(found["examples"]) == [
        ["ant/0.jpg (val)", "ant/2.jpg (train)", "ant/5.jpg (train)"],
        ["bee/3.jpg (train)", "bee/again.jpg (train)"],
    ]
    line = describe_duplicates(found)
    assert line.startswith(
        "5 images are there more than once, in 2 groups, 1 of them in training and validation both:"
    )
    assert "bee/3.jpg (train) = bee/again.jpg (train)" in line


def test_png_of_one_size_and_checksum(tree: Path) -> None:
    """The CRC-32 of a PNG has only 65536 values for each size, since it contains its own."""
    first: dict[tuple[int, int], bytes] = {}
    for number in range(3000):
        pixels = np.frombuffer(number.to_bytes(3, "little"), np.uint8).reshape(1, 1, 3)
        image = bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1])
        other = first.setdefault((len(image), zlib.crc32(image)), image)
        if other != image:
            break
    assert other != image
    for name, content in (("one", image), ("two", other), ("three", other)):
        (tree / f"train/ant/{name}.png").write_bytes(content)
    found = finished(options(tree))[1]["duplicates"]
    assert found["examples"] == [["ant/three.png (train)", "ant/two.png (train)"]]


def test_memory_of_equal_images(tmp_path: Path) -> None:
    rows = [
        RecordRow(FIRST_ID + at, 0, 0, f"{at}.jpg", 0, f"{at}.jpg", -1, 9, 7) for at in range(5000)
    ]
    make_table(tmp_path, [folder(tmp_path)], rows)
    (tmp_path / SHARD).write_bytes(bytes(32))
    with closing(edit_table(tmp_path / TABLE)) as edited:
        create_written(edited)
        edited.execute("INSERT INTO written SELECT id, 0, 32, 9, 5 FROM records")
    with open_table(tmp_path / TABLE) as table:
        tracemalloc.start()
        found = find_duplicates(table)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (found["groups"], found["images"]) == (1, 5000)
    assert peak < 1 << 20


def test_unpacked_archive_is_forgotten(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [(str(path.relative_to(tree)), path.read_bytes()) for path in tree.rglob("*.jpg")]
    make_tar(tmp_path / "all.tar.xz", contents, "w:xz")
    make_tar(tmp_path / "all.tar", contents)
    monkeypatch.chdir(tmp_path)  # the folder may be named from here
    packed = replace(options_of(Path("all.tar.xz:train"), Path("out"), HOW), val="all.tar:val")
    work = plan_work(packed)
    with open_table(work / TABLE) as table:
        spool = Path(table.sources()[0].file)
    assert spool.parent == tmp_path / "out" / ".pack"
    write_shards(work)
    manifest = finish(work)
    with open_table(work / TABLE) as table:
        files = [source.file for source in table.sources()]
    assert files == ["all.tar.xz:train", str(tmp_path / "all.tar")]
    assert [source["spec"] for source in manifest["sources"]] == ["all.tar.xz:train", "all.tar:val"]
    assert [source["kind"] for source in manifest["sources"]] == ["archive", "archive"]
    assert manifest["totals"]["images"] == 17


def test_finishing_again_is_the_same(tree: Path) -> None:
    work, manifest = finished(options(tree))
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    assert finish(work) | {"created": manifest["created"]} == manifest
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
