"""The end of a pack: table, indexes, listings and manifest all tell of what lies in the files."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.data.manifest import file_names, read_manifest, text_hashes
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions, Json, PackOptions, SplitOptions
from mpl_fast.packing.pack import publish_pack
from mpl_fast.packing.plan.table import TABLE, ShardRow, open_table
from mpl_fast.packing.publish.duplicates import describe_duplicates
from mpl_fast.packing.publish.finish import finish, unfinished_shards
from mpl_fast.packing.publish.out_folder import open_out_folder
from mpl_fast.packing.write.shard_receipt import ShardReceipt
from tests.packing.packs import (
    KEEP,
    Planned,
    finished,
    jpeg,
    make_tar,
    make_tree,
    options_of,
    plan_work,
    read_record,
    split_line,
    write_shards,
    written_rows,
)

HOW = SplitOptions(labeled="4", shards=2)
SKIP = ImageOptions(on_bad="skip")
BAD = {"train/ant/1.jpg", "train/bee/4.jpg", "val/ant/0.jpg"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with train/ (ant, bee: 6 each) and val/ (ant: 2, bee: 3), all different."""
    counts = {"train/ant": 6, "train/bee": 6, "val/ant": 2, "val/bee": 3}
    names = [f"{name}/{at}.jpg" for name, count in counts.items() for at in range(count)]
    content = {name: jpeg(at) for at, name in enumerate(names)}
    first = content["train/bee/0.jpg"]  # with a magic word at a place where its record is cut
    content["train/bee/0.jpg"] = first[:2] + b"\xff\xfe\0\x08--\x0a\x23\xd7\xce" + first[2:]
    return make_tree(tmp_path / "tree", content)


def options(tree: Path, how: SplitOptions = HOW, image_options: ImageOptions = KEEP) -> PackOptions:
    packed = options_of(tree / "train", tree.parent / "out", how, tree / "val")
    return replace(packed, image=image_options)


def entries(work: Path, stem: str) -> tuple[list[tuple[int, int]], list[tuple[int, int, str]]]:
    """Return the (id, offset) of an index, each once, and the (id, label, class/name) listed."""
    lines = [line.split("\t") for line in (work / f"{stem}.idx").read_text().splitlines()]
    listed = [split_line(line) for line in (work / f"{stem}.lst").read_bytes().splitlines()]
    return (
        list(dict.fromkeys((int(number), int(offset)) for number, offset in lines)),
        [(int(number), int(label), name) for number, label, name in listed],
    )


def test_unfinished(tree: Path) -> None:
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
    edits: list[Callable[[ShardRow], ShardRow]] = [
        lambda shard: shard._replace(content="another"),
        lambda shard: shard._replace(stamps="another"),
    ]
    for edit in edits:
        assert unfinished_shards(work, [edit(shards[0])]) == [first]


def test_nothing_is_finished_while_shards_are_missing(tree: Path) -> None:
    work = write_shards(plan_work(options(tree)))
    before = (work / TABLE).read_bytes()
    for name in ("train-00001-of-00002.rec", "val-00000-of-00002.rec"):
        (work / f"{name}.done").unlink()
    with pytest.raises(DataError) as caught:
        finish(work)
    assert str(caught.value) == (
        f"{work.parent}: 2 shards of the plan are not there: train-00001-of-00002.rec, "
        "val-00000-of-00002.rec; pack them (every part), then finish"
    )
    assert (work / TABLE).read_bytes() == before
    assert not (work / "classes.txt").exists()


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("shards", [1, 3])
def test_table_tells_where_each_image_lies(tree: Path, layout: str, shards: int) -> None:
    work, manifest = finished(options(tree, replace(HOW, layout=layout, shards=shards)))
    count = 0
    with open_table(work / TABLE) as table:
        for shard, told in zip(table.shards(), manifest["shards"], strict=True):
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
            assert at == len(content) == told["bytes"]
            assert hashlib.sha256(content).hexdigest() == told["sha256"]
    assert count == manifest["totals"]["images"] == (17 if layout == "shared" else 21)
    multipart = sum(shard["multipart"] for shard in manifest["shards"])
    assert multipart == (2 if layout == "separate" and in_labeled(work, "bee/0.jpg") else 1)


def in_labeled(work: Path, name: str) -> bool:
    return any(key == name for _, _, key in entries(work, "train_label")[1])


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("unlabeled", ["all", "rest"])
@pytest.mark.parametrize("shards", [1, 3])
def test_indexes_and_lists_agree(tree: Path, layout: str, unlabeled: str, shards: int) -> None:
    how = replace(HOW, layout=layout, unlabeled=unlabeled, shards=shards)
    work, manifest = finished(options(tree, how))
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
        counts[part, split["idx"]] = split["records"] = len(listed)
        per_class = Counter(label for _, label, _ in listed)
        assert split["per_class_min"] == min(per_class.values())
        assert split["per_class_max"] == max(per_class.values())
    expected = {"train_label.idx": 4, "train_unlabel.idx": 12 if unlabeled == "all" else 8}
    expected |= {"val.idx": 5} | ({"train.idx": 12} if layout == "shared" else {})
    assert {name: count for (_, name), count in counts.items()} == expected
    val = manifest["splits"]["val"]
    assert (val["per_class_min"], val["per_class_max"]) == (2, 3)


def test_index_of_a_shard_counts_from_its_start(tree: Path) -> None:
    work, manifest = finished(options(tree))
    told = [(shard["file"], shard["idx"], shard["first_id"]) for shard in manifest["shards"]]
    assert told[1] == ("train-00001-of-00002.rec", "train-00001-of-00002.idx", 6)
    for file, index, first_id in told:
        lines = (work / index).read_text().splitlines()
        assert lines[0] == f"{first_id}\t0"
        done = ShardReceipt.load(work / f"{file}.done")
        expected = zip(done.ids.tolist(), done.offsets.tolist(), strict=True)
        assert [tuple(map(int, line.split("\t"))) for line in lines] == list(expected)


def test_one_shard_of_each_gives_the_nine_files(tree: Path) -> None:
    _work, manifest = finished(options(tree, replace(HOW, layout="separate", shards=1)))
    nine = {
        f"{stem}.{kind}"
        for stem in ("train_label", "train_unlabel", "val")
        for kind in ("rec", "idx", "lst")
    }
    assert set(file_names(manifest)) == nine | {"classes.txt", TABLE}
    assert all("idx" not in shard for shard in manifest["shards"])


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_manifest_names_every_file_with_its_hash(tree: Path, layout: str) -> None:
    work, manifest = finished(options(tree, replace(HOW, layout=layout)))
    made = {path.name for path in work.iterdir() if path.suffix != ".done"}
    assert made == set(file_names(manifest))
    for name, sha256 in text_hashes(manifest).items():
        assert hashlib.sha256((work / name).read_bytes()).hexdigest() == sha256


def test_finished_folder_is_read(tree: Path) -> None:
    packed = options(tree)
    with open_out_folder(packed.out) as folder:
        write_shards(plan_work(packed))
        told = publish_pack(folder, 0.0)
    manifest = read_manifest(packed.out)
    assert manifest.classes == ("ant", "bee")
    assert manifest.splits["labeled"].records == told["splits"]["labeled"]["records"] == 4
    assert told["options"] == json.loads(json.dumps(packed.planned()))
    assert told["created"].endswith("+00:00")
    source_bytes = [
        sum(path.stat().st_size for path in (tree / part).rglob("*.jpg"))
        for part in ("train", "val")
    ]
    assert [source["bytes"] for source in told["sources"]] == source_bytes
    assert [source["images"] for source in told["sources"]] == [12, 5]
    assert told["totals"]["bytes_in"] == sum(source_bytes)
    sizes = [path.stat().st_size for path in packed.out.glob("*.rec")]
    assert told["totals"]["bytes_out"] == sum(sizes)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("shards", [1, 2])
def test_skipped_images_are_a_gap_everywhere(tree: Path, layout: str, shards: int) -> None:
    for name in BAD:
        (tree / name).write_bytes(b"no image")
    how = replace(HOW, layout=layout, shards=shards)
    work, manifest = finished(options(tree, how, SKIP))
    keys = {name.partition("/")[2] for name in BAD}
    plan = Planned(work / TABLE)
    paths = {row.id: row.path for row in plan.rows}
    bad = {
        row.id
        for row in plan.rows
        if f"{'val' if row in plan.of('val') else 'train'}/{row.path}" in BAD
    }
    with open_table(work / TABLE) as table:
        written = {number for (number,) in table.query("SELECT id FROM written")}
    assert written == {row.id for row in plan.rows} - bad
    listed = set()
    for split in manifest["splits"].values():
        index, rows = entries(work, split["idx"].removesuffix(".idx"))
        listed |= {number for number, _ in index}
        assert {number for number, _ in index} == {number for number, _, _ in rows}
        assert split["records"] == len(rows)
        assert split["per_class_max"] == max(Counter(label for _, label, _ in rows).values())
    assert listed == written
    if shards > 1:
        local = {
            int(line.split("\t")[0])
            for shard in manifest["shards"]
            for line in (work / shard["idx"]).read_text().splitlines()
        }
        assert local == written
    assert manifest["totals"]["images"] == len(written)
    assert sum(shard["records"] for shard in manifest["shards"]) == len(written)
    assert len(manifest["bad"]) == len(bad)
    assert {remark["image"] for remark in manifest["bad"]} == keys
    assert {remark["source"] for remark in manifest["bad"]} == {str(tree / name) for name in BAD}
    assert {remark["action"] for remark in manifest["bad"]} == {"skipped"}
    assert all(remark["reason"] for remark in manifest["bad"])
    assert {paths[number] for number in bad} == keys
    assert manifest["splits"]["val"]["per_class_min"] == 1


def test_split_of_which_nothing_is_left(tree: Path) -> None:
    names = tree.parent / "names.txt"
    names.write_text("ant/0.jpg\nbee/0.jpg\n")
    for name in ("ant", "bee"):
        (tree / "train" / name / "0.jpg").write_bytes(b"no image")
    packed = options(tree, replace(HOW, labeled=str(names)), SKIP)
    with pytest.raises(DataError, match="labeled: none of its images is left"):
        finished(packed)


def duplicates(tree: Path, layout: str = "shared") -> Json:
    found: Json = finished(options(tree, replace(HOW, layout=layout)))[1]["duplicates"]
    return found


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_images_that_are_there_twice(tree: Path, layout: str) -> None:
    found = duplicates(tree, layout)
    assert found == {"groups": 0, "images": 0, "across_splits": 0, "examples": []}
    assert describe_duplicates(found) == ""
    (tree / "train/bee/3.jpg").write_bytes((tree / "train/ant/2.jpg").read_bytes())
    found = duplicates(tree, layout)
    assert (found["groups"], found["images"], found["across_splits"]) == (1, 2, 0)
    named = {name.partition(" (")[0] for group in found["examples"] for name in group}
    assert named == {"ant/2.jpg", "bee/3.jpg"}
    for number in range(12):  # only ten groups are named
        for name in ("one", "two"):
            (tree / f"train/ant/{name}-{number}.jpg").write_bytes(jpeg(1000 + number))
    found = duplicates(tree, layout)
    assert (found["groups"], found["images"], len(found["examples"])) == (13, 26, 10)


def test_images_in_training_and_validation(tree: Path) -> None:
    for name in ("train/ant/5.jpg", "val/ant/0.jpg"):
        (tree / name).write_bytes((tree / "train/ant/2.jpg").read_bytes())
    os.link(tree / "train/bee/3.jpg", tree / "train/bee/again.jpg")
    found = duplicates(tree)
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
    packed = options(tree)
    work, manifest = finished(packed)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    assert finish(work) | {"created": manifest["created"]} == manifest
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_names_of_any_bytes(tree: Path) -> None:
    odd = os.fsdecode(b"\xff %'\"")
    (tree / "train/ant").rename(tree / "train" / f"ant{odd}")
    (tree / "train/bee/0.jpg").rename(tree / "train/bee" / f"{odd}.jpg")
    packed = replace(options(tree), val=None, out=tree.parent / odd / "out")
    work, manifest = finished(packed)
    assert (work / "classes.txt").read_bytes() == b"ant\xff %'\"\nbee\n"
    assert f"bee/{odd}.jpg" in {name for _, _, name in entries(work, "train")[1]}
    assert manifest["classes"]["n"] == 2
